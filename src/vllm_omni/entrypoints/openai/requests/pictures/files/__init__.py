"""Readers of the structure of picture files: what reaches an image decoder is bounded before."""
