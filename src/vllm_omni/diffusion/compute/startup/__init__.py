"""Measurements and choices at the start of a worker: attention, threads, rates, compiled code."""
