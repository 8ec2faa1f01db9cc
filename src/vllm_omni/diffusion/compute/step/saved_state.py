"""State of a request between two steps as tensors by name, and its way back into a new state.

A noise scheduler's state is saved as the tensors that it keeps of earlier steps. Its counters follow from the number of
steps, so a restored scheduler first makes these steps with a blank tensor, and then gets the saved tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.messages.checkpoint import BITS, LATENTS, Checkpoint, CheckpointValue, unfit
from vllm_omni.diffusion.messages.request import DiffusionRequest

_NO_FACTS = ("request_id", "prompt", "negative_prompt", "cache", "loras")
"""Fields of a request that `request_facts` leaves out."""
_BLANK = torch.zeros((1, 1))
"""Stands for latents of any shape; no other tensor of a scheduler has two dims."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint whose tensors are still on the device."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, CheckpointValue]


def save_state(latents: Tensor, scheduler: Any, step: int, values: dict[str, CheckpointValue]) -> SavedState:
    """State after `step` steps, without a copy: no tensor of a state changes in place.

    latents: [tokens, channels]. After the last step the scheduler is not needed.
    """
    tensors = {LATENTS: latents}
    if step < len(scheduler.timesteps):
        tensors |= {name: value for name, value, _ in _kept_tensors(scheduler, latents.shape)}
    return SavedState(step, tensors, values)


def restore_state(
    checkpoint: Checkpoint, noise: Tensor, scheduler: Any, values: dict[str, CheckpointValue], dtype: torch.dtype
) -> Tensor:
    """Latents of the checkpoint, on the device of `noise`; `scheduler`, at its first step, moves to that step.

    noise: the request's latents before its first step; values: as `save_state` would get them; dtype: the model's.
    Raises InvalidRequestError for a checkpoint of another request; the scheduler may have changed then.
    """
    for name in values.keys() | checkpoint.values.keys():
        if (got := checkpoint.values.get(name)) != (expected := values.get(name)):
            raise unfit(f"{name} {got!r:.60}, the request has {expected!r:.60}")
    slots = {}
    if checkpoint.step < len(scheduler.timesteps):
        for timestep in scheduler.timesteps[: checkpoint.step]:
            scheduler.step(_BLANK, timestep, _BLANK, return_dict=False)
        slots = {name: put for name, _, put in _kept_tensors(scheduler, _BLANK.shape)}
    if checkpoint.arrays.keys() != {LATENTS, *slots}:
        raise unfit(f"the arrays {', '.join(sorted(checkpoint.arrays)):.200}")
    tensors = {name: _tensor(checkpoint, name, noise, dtype) for name in checkpoint.arrays}
    for name, put in slots.items():
        put(to_device(tensors[name], noise.device))
    return to_device(tensors[LATENTS], noise.device)


def request_facts(request: DiffusionRequest) -> dict[str, CheckpointValue]:
    """Facts of a checkpoint: all that pixels depend on in a request, with digests in place of prompts and pictures.

    Adapters are the family's to tell, by their contents. Whether the step cache may skip blocks is no fact: the servers
    of a job may differ in it, and each is allowed its own approximation.
    """
    values: dict[str, Any] = {field.name: getattr(request, field.name) for field in fields(request)}
    for name in _NO_FACTS:
        del values[name]
    facts: dict[str, CheckpointValue] = {"prompts": text_digest(request.prompt, request.negative_prompt)}
    for name, value in values.items():
        if name == "images":
            value = [image.digest for image in request.images]
        facts[name] = list(value) if isinstance(value, tuple) else value
    return facts


def text_digest(*texts: str | None) -> str:
    """Hexadecimal digest of texts, for the facts of a checkpoint, which error messages show: they show no prompt."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()


def _tensor(checkpoint: Checkpoint, name: str, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Tensor of an array, on the host. Raises InvalidRequestError unless it can be a tensor of the request."""
    array, name_of_dtype = checkpoint.arrays[name], checkpoint.dtypes[name]
    if array.shape != noise.shape:
        raise unfit(f"{name} of shape {list(array.shape)}, the request has {list(noise.shape)}")
    if (found := getattr(torch, name_of_dtype)) not in (torch.float32, dtype):
        raise unfit(f"{name} of dtype {name_of_dtype}, the model has {str(dtype).removeprefix('torch.')}")
    tensor = torch.tensor(array)  # a copy: the array may be read-only
    return tensor.view(found) if str(array.dtype) == BITS else tensor


def _kept_tensors(scheduler: Any, shape: Sequence[int]) -> Iterator[tuple[str, Tensor, Callable[[Tensor], object]]]:
    """Name, value and setter of each tensor of this shape that the scheduler keeps, alone or in a list."""
    for attribute, value in sorted(vars(scheduler).items()):
        name = f"scheduler.{attribute.lstrip('_')}"
        if _is_latents(value, shape):
            yield name, value, partial(setattr, scheduler, attribute)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if _is_latents(item, shape):
                    yield f"{name}.{i}", item, partial(value.__setitem__, i)


def _is_latents(value: object, shape: Sequence[int]) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.shape == torch.Size(shape)
