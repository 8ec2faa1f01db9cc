"""`AsyncOmni` under the import path of the public vllm-omni package."""

from vllm_omni.omni import AsyncOmni

__all__ = ["AsyncOmni"]
