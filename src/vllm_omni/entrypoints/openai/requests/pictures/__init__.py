"""Decoding of uploaded pictures in processes of their own."""
