"""Runs of weights: layout, views and copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import ALIGNMENT, FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import host_run


class Mixed(nn.Module):
    """Tensors of several dtypes, one of them shared, one channels-last, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.tied = nn.Linear(3, 5)
        self.tied.weight = self.linear.weight
        self.conv = nn.Conv2d(2, 3, 3, dtype=torch.bfloat16)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(4, dtype=torch.float64))


@pytest.fixture
def module() -> Mixed:
    return Mixed().requires_grad_(False)


def test_a_run_keeps_values_dtypes_and_the_order_of_dims(module: Mixed) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flat = FlatWeights([module])
    first, second = host_run(flat.num_bytes, torch.device("cpu")), host_run(flat.num_bytes, torch.device("cpu"))
    flat.save(first)
    second.copy_(first)
    flat.attach(second)
    first.zero_()  # nothing of it is used any more
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert tensor.data_ptr() % tensor.element_size() == 0
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.tied.weight is module.linear.weight


def test_a_shared_tensor_has_one_place_and_every_place_is_aligned(module: Mixed) -> None:
    flat = FlatWeights([module])
    assert len(flat.tensors) == 6  # weight and bias, the other bias, two of the convolution, the buffer
    starts = [
        view.storage_offset() * view.element_size()
        for view in flat.views(host_run(flat.num_bytes, torch.device("cpu")))
    ]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert flat.num_bytes == len(flat.tensors) * ALIGNMENT  # each is smaller than that


def test_tensors_that_are_left_out_stay_where_they_are(module: Mixed) -> None:
    place = module.scale.data_ptr()
    flat = FlatWeights([module], without=[module.scale])
    flat.attach(torch.zeros(flat.num_bytes, dtype=torch.uint8))
    assert module.scale.data_ptr() == place
    assert not module.linear.weight.any()


def test_the_layout_is_known_on_the_meta_device() -> None:
    with torch.device("meta"):
        flat = FlatWeights([nn.Linear(1000, 10, bias=False)])
    assert flat.num_bytes == 40_192  # 40,000 bytes, aligned
