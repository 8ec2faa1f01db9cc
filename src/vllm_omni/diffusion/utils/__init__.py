"""Functions that scripts import from here in the public vllm-omni package."""
