"""Theoretical cost of a denoising step, and how near a card comes to it: `python -m benchmarks.roofline`."""
