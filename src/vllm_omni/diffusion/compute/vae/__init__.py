"""Decoding of latents to pictures: tiles, sharing between ranks, memory layout."""
