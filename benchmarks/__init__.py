"""Measurements: each prints ratios taken in one run, and leaves JSON and a picture."""
