"""`LoRARequest` under the import path of the public vllm-omni package."""

from vllm_omni.inputs.data import LoRARequest

__all__ = ["LoRARequest"]
