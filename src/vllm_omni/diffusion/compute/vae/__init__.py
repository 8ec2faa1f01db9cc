"""Decode of latents to pictures: batches, tiles that ranks share, memory layout."""
