"""The diffusion engine: `control` decides in plain Python, `compute` runs models on tensors."""
