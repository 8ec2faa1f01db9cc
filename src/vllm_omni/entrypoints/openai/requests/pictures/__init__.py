"""Decoding of uploaded pictures in separate processes."""
