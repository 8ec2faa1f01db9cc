"""Tiny models, fakes and drivers that tests and benchmarks share. Nothing in `src` imports them."""
