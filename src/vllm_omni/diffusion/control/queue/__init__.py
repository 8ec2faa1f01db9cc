"""Requests on their way, and the order in which they go on."""
