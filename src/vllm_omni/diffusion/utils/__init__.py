"""Functions under their import paths in the public vllm-omni package."""
