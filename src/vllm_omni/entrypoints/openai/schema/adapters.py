"""Request and response bodies of the routes of LoRA adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.schema.images import RequestBody, at_most
from vllm_omni.inputs.adapter_names import MAX_NAME_CHARACTERS
from vllm_omni.inputs.adapter_paths import MAX_PATH_CHARACTERS
from vllm_omni.inputs.adapters import AdapterSource, AdapterState

AdapterName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]


class LoadLoRAAdapterRequest(RequestBody):
    """Body of `POST /v1/load_lora_adapter`, as in vLLM, and `defaults`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    lora_name: AdapterName
    """Name by which requests choose the adapter."""
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS)]
    """A safetensors file or a folder with one, within the folders of `--lora-dir`; relative paths begin there."""
    load_inplace: bool = False
    """Replace the adapter of this name; requests that run keep the one that they began with."""
    defaults: Annotated[dict[str, Any], at_most(64)] | None = None
    """Sampling parameters for requests that name the adapter and do not give them."""
    is_3d_lora_weight: Literal[False] | None = None
    """A layout of mixtures of experts, which no model here has."""


class UnloadLoRAAdapterRequest(RequestBody):
    """Body of `POST /v1/unload_lora_adapter`, as in vLLM."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    lora_name: AdapterName
    lora_int_id: int | None = None
    """Without effect: an adapter is known by its name."""


class LoRACard(BaseModel):
    id: str
    object: Literal["lora"] = "lora"
    file: str
    """Path within its `--lora-dir`, or else the file's name;
    that of a file such as `pytorch_lora_weights.safetensors` follows its folder's name."""
    source: AdapterSource
    """`start`: of `--lora-modules`; `loaded`: by `/v1/load_lora_adapter`; `folder`: a file of `--lora-dir`."""
    state: AdapterState
    """Place of its weights: `device`, `host` memory, or only `disk`, from which the next request has it read."""
    defaults: dict[str, Any]
    """Sampling parameters of requests that name the adapter and do not give them."""


class LoRAList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LoRACard]
