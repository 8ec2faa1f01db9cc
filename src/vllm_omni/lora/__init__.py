"""Import paths of the public vllm-omni package for LoRA adapters; see `diffusion/control/adapters.py`."""
