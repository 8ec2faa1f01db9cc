"""What a denoising step costs in theory, and how near a card comes to it: `python -m benchmarks.roofline`."""
