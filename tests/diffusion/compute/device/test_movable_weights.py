"""Weights that leave the device and come back: values, places and bytes."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch
from torch import nn

from vllm_omni.diffusion.compute.device.movable_weights import MovableWeights

CPU = torch.device("cpu")


def make_modules() -> list[nn.Module]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.randn(3)
    return [nn.Sequential(nn.Linear(7, 5), norm), nn.Conv2d(3, 4, 3).to(dtype=torch.bfloat16)]


@torch.inference_mode()
def test_weights_leave_and_come_back() -> None:
    modules = make_modules()
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    before = [t.clone() for t in tensors]
    devices = [weakref.ref(t.untyped_storage()) for t in tensors]
    weights = MovableWeights(modules, CPU)
    for _ in range(2):
        weights.leave()
        host = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(host) == 1, "all lie in one run"
        assert not any(storage() for storage in devices), "nothing keeps the device's memory"
        with patch.object(torch, "empty", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
            weights.reserve()
        weights.cancel()
        weights.reserve()
        weights.come_back()
        assert not host & {t.untyped_storage().data_ptr() for t in tensors}
        assert all(torch.equal(t, b) and t.dtype == b.dtype for t, b in zip(tensors, before, strict=True))
    assert sum(t.nbytes for t in tensors) <= weights.num_bytes


def test_weights_elsewhere_stay_there() -> None:
    modules = make_modules()
    modules[1].to("meta")
    places = [t.data_ptr() for t in modules[0].parameters()]
    weights = MovableWeights(modules, torch.device("meta"))
    assert 0 < weights.num_bytes < 5 * 256
    assert [t.data_ptr() for t in modules[0].parameters()] == places


def test_calls_out_of_order_are_refused() -> None:
    weights = MovableWeights(make_modules(), CPU)
    with pytest.raises(AssertionError, match="host memory"):
        weights.come_back()
    weights.leave()
    with pytest.raises(AssertionError, match="on the device"):
        weights.leave()
    with pytest.raises(AssertionError, match="`reserve` comes first"):
        weights.come_back()
