"""LoRA adapters under the import paths of the public vllm-omni package; `diffusion/lora.py` is what resolves them."""
