"""ASGI middlewares around all routes."""
