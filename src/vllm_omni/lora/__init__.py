"""LoRA adapters under the import paths of the public vllm-omni package; see `diffusion/control/adapters.py`."""
