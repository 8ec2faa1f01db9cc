"""Copies of checkpoints from the device to the host, during later work of the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.step.finite import is_finite
from vllm_omni.diffusion.compute.step.saved_state import SavedState
from vllm_omni.diffusion.messages.checkpoint import STORED_DTYPES, Checkpoint


def download_checkpoints(
    states: Mapping[str, SavedState], device: Device
) -> Callable[[], dict[str, Checkpoint | None]]:
    """Start to copy the states, by request id, to the host; the returned call waits for the copies.

    It returns None for a state with values that are NaN or infinite.
    """
    copied = device.download(
        {f"{i} {name}": x.view(_stored(x)) for i, state in states.items() for name, x in state.tensors.items()}
        | {i: torch.stack([is_finite(x) for x in state.tensors.values()]) for i, state in states.items()}
    )

    def checkpoints() -> dict[str, Checkpoint | None]:
        arrays = copied()
        return {
            i: Checkpoint(
                state.step,
                {name: arrays[f"{i} {name}"] for name in state.tensors},
                {name: _name(x.dtype) for name, x in state.tensors.items()},
                state.values,
            )
            if arrays[i].all()
            else None
            for i, state in states.items()
        }

    return checkpoints


def _stored(x: torch.Tensor) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, STORED_DTYPES[_name(x.dtype)])
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
