"""`Omni` under the import path of the public vllm-omni package."""

from vllm_omni.omni import Omni

__all__ = ["Omni"]
