"""Turns of components: places of their weights, copies, and what an error leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.diffusion.compute.offload.strict_turns import CountingMemory
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.offload.turns import Turns

CPU = torch.device("cpu")


class Model:
    """Three components with known outputs, of which one size and a half fit on the device."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules = {name: nn.Linear(16, 16).requires_grad_(False) for name in ("text_encoder", "transformer")}
        self.modules["vae"] = nn.Linear(4, 4).requires_grad_(False)
        self.inputs = {name: torch.randn(2, module.in_features) for name, module in self.modules.items()}
        self.wanted = {name: module(self.inputs[name]) for name, module in self.modules.items()}
        self.memory = CountingMemory(CPU)
        self.turns = Turns(CPU, is_on=True, memory=self.memory)
        for name, module in self.modules.items():
            self.turns.keep(name, [module])
        self.sizes = {name: FlatWeights([module]).num_bytes for name, module in self.modules.items()}
        self.turns.begin(int(1.5 * self.sizes["transformer"]))

    def run(self, name: str) -> Tensor:
        output: Tensor = self.modules[name](self.inputs[name])
        return output

    def check(self, name: str) -> None:
        with self.turns.use(name):
            assert torch.equal(self.run(name), self.wanted[name])
            run = self.turns._components[name].device[0]
            assert self.modules[name].weight.untyped_storage().data_ptr() == run.untyped_storage().data_ptr()


@pytest.fixture
def model() -> Model:
    return Model()


def test_components_come_and_leave_with_their_weights(model: Model) -> None:
    for name in ("text_encoder", "transformer", "vae", "transformer", "text_encoder", "vae"):
        model.check(name)
        assert model.memory.num_bytes <= model.turns.residency.max_bytes
    assert model.memory.places == {name: model.sizes[name] for name in ("text_encoder", "vae")}
    assert model.turns.num_copied_bytes == 3 * model.sizes["transformer"] + 2 * model.sizes["vae"]
    model.turns.release_memory()
    assert model.memory.places == {}
    for name, module in model.modules.items():  # at rest the weights are those of the host
        assert module.weight.untyped_storage().data_ptr() == model.turns._components[name].host[0].data_ptr()
        assert torch.equal(model.run(name), model.wanted[name])


def test_a_failed_copy_leaves_nothing_on_the_device(model: Model) -> None:
    model.check("text_encoder")
    model.memory.fails_after = model.memory.num_taken
    with pytest.raises(torch.OutOfMemoryError), model.turns.use("transformer"):
        raise AssertionError("it is not there")
    assert model.memory.places == {}
    assert model.turns.residency.present == ()
    model.check("transformer")


def test_an_error_in_a_use_ends_it(model: Model) -> None:
    with pytest.raises(ValueError, match="a fault"), model.turns.use("transformer"):
        raise ValueError("a fault")
    model.turns.release_memory()
    assert model.memory.places == {}


def test_a_component_in_use_stays_and_no_other_is_used_meanwhile(model: Model) -> None:
    with model.turns.use("transformer"), model.turns.use("transformer"):
        model.turns.release_memory()
        assert torch.equal(model.run("transformer"), model.wanted["transformer"])
        with pytest.raises(AssertionError, match="vae is used within a use of"), model.turns.use("vae"):
            pass


def test_a_module_is_loaded_into_its_place() -> None:
    memory = CountingMemory(CPU)
    turns = Turns(CPU, is_on=True, memory=memory)
    with torch.device("meta"):
        module = nn.Linear(3, 5, dtype=torch.bfloat16)
    place = turns.rest("transformer")
    assert place is not None
    with torch.inference_mode():
        place(module)
        module.weight.fill_(2.0)
        module.bias.fill_(1.0)
        turns.begin(10**9)
        with turns.use("transformer"):
            assert module(torch.ones(1, 3, dtype=torch.bfloat16)).tolist() == [[7.0] * 5]
    assert memory.peak_bytes == turns.residency.sizes["transformer"] == 512


def test_without_offload_nothing_moves() -> None:
    turns = Turns(CPU, is_on=False)
    module = nn.Linear(3, 5)
    place = module.weight.data_ptr()
    assert turns.rest("transformer") is None
    turns.keep("vae", [module])
    turns.begin(1)
    with turns.use("vae"), turns.use("transformer"):
        turns.release_memory()
    assert module.weight.data_ptr() == place
