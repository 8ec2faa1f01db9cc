"""Pictures and videos of every family are the same when components take turns, and memory is as predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, fitted, kept
from testbed.tiny_wan import build_tiny_wan
from tests.diffusion.compute.families import test_adapters
from tests.diffusion.compute.families.wan import test_videos as wan
from tests.diffusion.compute.offload.strict_turns import turns_of, use_strict_turns
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.offload import turns
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

pytestmark = pytest.mark.usefixtures("one_thread")

Arrivals = Mapping[int, Sequence[DiffusionRequest]]


@dataclass(frozen=True)
class Family:
    build: Callable[[Path], Path]
    arrivals: Callable[[Path], Arrivals]


def of_pictures(name: str) -> Family:
    family = test_adapters.FAMILIES[name]

    def arrivals(path: Path) -> Arrivals:
        first, second, third = (family.request(path, number, ()) for number in range(3))
        return {0: [first, second], 1: [third]}

    return Family(family.build, arrivals)


def of_videos(kind: str) -> Family:
    build = partial(build_tiny_wan, kind=kind, default_sampling_params=wan.SMALL)

    def arrivals(path: Path) -> Arrivals:
        joining, info = wan.arrivals_of(path, kind), load_model_info(str(path))
        first, second = ([fitted(request, info) for request in joining[step]] for step in (0, 2))
        return {0: first, 1: second[:2]}

    return Family(build, arrivals)


FAMILIES = {name: of_pictures(name) for name in ("qwen_image", "edit", "z_image")} | {
    kind: of_videos(kind) for kind in ("t2v-a14b", "i2v-2.1", "i2v-5b")
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def path(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.build(tmp_path_factory.mktemp("models") / "model")


def start(path: Path, turns_bytes: int | None = None, **settings: Any) -> ModelRunner:
    config = OmniDiffusionConfig(model=str(path), **settings)
    options = replace(QUICK, turns_bytes=turns_bytes)
    runner = ModelRunner(config, load_model_info(str(path)), options=options)
    runner.start()
    return runner


def in_turns(path: Path, monkeypatch: pytest.MonkeyPatch, turns_bytes: int, **settings: Any) -> ModelRunner:
    use_strict_turns(monkeypatch)
    return start(path, turns_bytes, enable_cpu_offload=True, **settings)


@pytest.mark.parametrize("settings", [{}, {"quantization": "fp8"}], ids=["plain", "fp8"])
def test_pictures_are_the_same_with_one_component_at_a_time(
    family: Family, path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = family.arrivals(path)
    wanted = Drive(start(path, **settings)).run(arrivals)
    assert wanted.errors == {}
    runner = in_turns(path, monkeypatch, turns_bytes=1, **settings)
    memory, residency = turns_of(runner).memory, turns_of(runner).residency
    drive = Drive(runner).run(arrivals)
    assert drive.errors == {}
    assert drive.images.keys() == wanted.images.keys()
    for request_id, picture in wanted.images.items():
        assert np.array_equal(drive.images[request_id], picture), request_id
    assert memory.peak_bytes == residency.peak_bytes == max(residency.sizes.values())
    assert kept(runner) == 0
    assert memory.places == {residency.present[0]: residency.num_bytes}


def test_the_components_are_those_of_the_model(family: Family, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = in_turns(path, monkeypatch, turns_bytes=2**40)
    pipeline: Any = runner.pipeline
    sizes = pipeline.turns.residency.sizes
    assert ("transformer_2" in sizes) == (len(pipeline.transformers) == 2)
    assert ("image_encoder" in sizes) == ("image_encoder" in pipeline.components)
    assert {"text_encoder", "transformer", "vae"} <= sizes.keys()
    assert sizes["vae"] == FlatWeights(pipeline.components["vae"]).num_bytes
    transformers = sum(size for name, size in sizes.items() if name in turns.TRANSFORMERS)
    assert transformers == FlatWeights(pipeline.components["transformer"]).num_bytes
    Drive(runner).run(family.arrivals(path))
    assert pipeline.turns.num_copied_bytes <= sum(sizes.values())  # each came once and stays


@torch.inference_mode()
def test_encodes_of_a_plan_share_the_turns(family: Family, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = in_turns(path, monkeypatch, turns_bytes=1)
    came: list[str] = []
    memory = turns_of(runner).memory
    take = memory.take

    def noted(name: str, num_bytes: int) -> torch.Tensor:
        if not came or came[-1] != name:
            came.append(name)
        return take(name, num_bytes)

    monkeypatch.setattr(memory, "take", noted)
    requests = family.arrivals(path)[0]
    Drive(runner).run({0: [replace(r, request_id=f"{i} {r.request_id}") for r in requests for i in range(2)]})
    assert came.count("text_encoder") <= 1  # it may be there from the start
    assert came.count("image_encoder") <= 1
