"""Readers of the structure of picture files. They limit what reaches an image decoder."""
