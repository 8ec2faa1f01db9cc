"""Theoretical cost of a denoising step, and a card's measured rates: `python -m benchmarks.roofline`."""
