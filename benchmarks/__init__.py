"""Measurements. Each prints ratios from one run, and writes JSON and a picture."""
