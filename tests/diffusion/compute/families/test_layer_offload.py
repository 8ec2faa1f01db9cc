"""Models whose blocks stream from host memory draw what they draw with all weights on the device."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from torch import Tensor

from testbed.runner_driver import QUICK, Drive, fitted, kept, make_request
from testbed.slow_cases import slow_unless
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from tests.diffusion.compute.cache.driving import watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.cache.test_families import edits, videos, z_images
from tests.diffusion.compute.families.wan.test_videos import arrivals_of
from tests.diffusion.compute.offload.checked_copies import CheckedCopies, CopiesWithoutWaiting
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.offload import layer_offload
from vllm_omni.diffusion.compute.offload.layer_offload import BLOCKS, ENCODERS, ONCE, LayerOffload
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA

pytestmark = pytest.mark.usefixtures("module_on_one_thread")

OFFLOAD: dict[str, Any] = {"enable_layerwise_offload": True, "resident_layers": 0}
ADAPTER = "adapter.safetensors"


def pictures(folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    """With an adapter in the folder, which one of the requests has."""
    path = build_tiny_qwen_image(folder, layers=5, default_sampling_params=SMALL)
    file = save_peft(random_pairs(transformer_of(path), 1), folder / ADAPTER)
    return path, [
        make_request("guided", negative_prompt="a blue car", num_inference_steps=4, seed=3),
        make_request("adapted", height=32, width=80, num_inference_steps=3, loras=(LoRA("one", str(file), 1.0),)),
        make_request("long", "apple " * 20, height=80, width=48, num_inference_steps=2, seed=2),
    ]


def animations(folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    """Videos of input pictures, which the transformer sees through an image encoder."""
    path = build_tiny_wan(folder, "i2v-2.1", layers=3, default_sampling_params=SMALL)
    info = load_model_info(str(path))
    return path, [fitted(r, info) for r in chain.from_iterable(arrivals_of(path, "i2v-2.1").values())]


FAMILIES = {build.__name__: build for build in (pictures, edits, z_images, videos, animations)}


class Model:
    """Folder of one family's model, requests to it, and their pictures with all weights on the device."""

    def __init__(self, path: Path, requests: Sequence[DiffusionRequest]) -> None:
        self.path = path
        self.requests = requests
        self._plain: dict[str, dict[str, np.ndarray]] = {}

    def start(self, **settings: Any) -> ModelRunner:
        config = OmniDiffusionConfig(model=str(self.path), **settings)
        info = load_model_info(str(self.path))
        info.check_settings(config)
        runner = ModelRunner(config, info, options=QUICK)
        runner.start()
        return runner

    def draw(self, runner: ModelRunner) -> dict[str, np.ndarray]:
        """Pictures of requests that join one after another."""
        drive = Drive(runner).run({step: [request] for step, request in enumerate(self.requests)})
        assert not drive.errors
        return drive.images

    def check(self, runner: ModelRunner, **settings: Any) -> None:
        """Require the pictures of a runner with these settings, all of whose weights are on the device."""
        key = str(settings)
        if key not in self._plain:
            self._plain[key] = self.draw(self.start(**settings))
        got, wanted = self.draw(runner), self._plain[key]
        assert got.keys() == wanted.keys()
        for name, picture in wanted.items():
            assert np.array_equal(got[name], picture), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(*FAMILIES[name](tmp_path_factory.mktemp("offload") / name))
        return made[name]

    return get


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> CheckedCopies:
    made = CheckedCopies()
    monkeypatch.setattr(layer_offload, "copies_for", lambda device: made)
    return made


def offload_of(runner: ModelRunner) -> LayerOffload:
    offload: LayerOffload | None = getattr(runner.pipeline, "layer_offload", None)
    assert offload is not None
    return offload


def weights_of(runner: ModelRunner) -> list[Tensor]:
    components: dict[str, Any] = getattr(runner.pipeline, "components")  # noqa: B009 - of packed families alone
    modules = chain.from_iterable(components.values())
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def device_bytes(runner: ModelRunner) -> int:
    """Bytes of the memory that the parameters of the model are views of."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights_of(runner)}
    return sum(storages.values())


@pytest.mark.parametrize("name", [slow_unless(name, "edits", "videos") for name in FAMILIES])
def test_every_kind_of_layer_streams_and_pictures_are_the_same(
    name: str, models: Callable[[str], Model], copies: CheckedCopies
) -> None:
    runner = models(name).start(**OFFLOAD)
    offload = offload_of(runner)
    assert offload.streams.keys() == {BLOCKS, ONCE, ENCODERS}
    assert offload.num_resident_blocks == 0
    assert copies.slot_bytes == offload.num_slot_bytes
    models(name).check(runner)


@pytest.mark.parametrize("name", [slow_unless(name, "pictures") for name in ("pictures", "z_images", "videos")])
def test_pictures_in_float8_are_the_same(name: str, models: Callable[[str], Model], copies: CheckedCopies) -> None:
    runner = models(name).start(**OFFLOAD, quantization="fp8")
    models(name).check(runner, quantization="fp8")


@pytest.mark.parametrize("backend", ["tea_cache", "cache_dit"])
@pytest.mark.parametrize("name", [slow_unless(name, "edits") for name in ("edits", "z_images", "videos")])
def test_step_caches_skip_the_same_blocks(
    name: str, backend: str, models: Callable[[str], Model], copies: CheckedCopies
) -> None:
    model, settings = models(name), {"cache_backend": backend, "cache_config": settings_of(backend, name)}
    runner = model.start(**OFFLOAD, **settings)
    skips = watch_skips(runner)
    model.check(runner, **settings)
    assert sum(map(len, chain.from_iterable(skips.values()))), "nothing was skipped"


@pytest.mark.parametrize("name", [slow_unless(name, "videos") for name in ("pictures", "z_images", "videos")])
def test_the_first_blocks_stay_on_the_device(name: str, models: Callable[[str], Model], copies: CheckedCopies) -> None:
    runner = models(name).start(enable_layerwise_offload=True, resident_layers=1)
    assert offload_of(runner).num_resident_blocks == len(getattr(runner.pipeline, "transformers"))  # noqa: B009
    models(name).check(runner)


def test_memory_falls_by_the_weights_that_stream(models: Callable[[str], Model], copies: CheckedCopies) -> None:
    plain = device_bytes(models("pictures").start())
    runners = [models("pictures").start(enable_layerwise_offload=True, resident_layers=n) for n in (0, 2, 5)]
    for runner in runners:
        offload = offload_of(runner)
        tensors = len(weights_of(runner))
        padding = 256 * tensors  # runs are aligned
        assert abs(device_bytes(runner) - (plain - offload.num_host_bytes + offload.num_slot_bytes)) < padding
    assert sorted(map(device_bytes, runners)) == [*map(device_bytes, runners)]
    assert device_bytes(runners[0]) < 0.6 * plain


@pytest.mark.parametrize("share", [0.0, 0.6, 0.8, 1.0])
def test_as_many_blocks_stay_as_the_memory_has_room_for(
    share: float, models: Callable[[str], Model], copies: CheckedCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LayerOffload.start
    given: list[int] = []

    def with_memory(offload: LayerOffload, free_bytes: int) -> None:
        given.append(int(share * (offload.num_host_bytes + offload.num_slot_bytes)))
        start(offload, given[0])

    with monkeypatch.context() as patch:
        patch.setattr(LayerOffload, "start", with_memory)
        runner = models("pictures").start(enable_layerwise_offload=True)
        least = models("pictures").start(**OFFLOAD)
    offload = offload_of(runner)
    more = device_bytes(runner) - device_bytes(least) + offload_of(least).num_slot_bytes
    assert more <= max(given[0], offload_of(least).num_slot_bytes)
    if share in (0.0, 1.0):
        assert offload.num_resident_blocks == 5 * share
    else:
        assert 0 < offload.num_resident_blocks <= 5
    models("pictures").check(runner)


def test_a_missing_wait_shows(models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_offload, "copies_for", lambda device: CopiesWithoutWaiting())
    drive = Drive(models("pictures").start(**OFFLOAD)).run({0: models("pictures").requests[:1]})
    assert "finite" in drive.errors["guided"].message


def test_after_an_error_in_a_block_pictures_are_the_same(models: Callable[[str], Model], copies: CheckedCopies) -> None:
    model = models("pictures")
    runner = model.start(**OFFLOAD)
    transformer: Any = getattr(runner.pipeline, "transformer")  # noqa: B009
    fault = Mock(side_effect=RuntimeError("a fault inside the block"))
    for block in transformer.blocks:
        hook = block.image.up.register_forward_hook(fault)
        failed = Drive(runner).run({0: model.requests})
        assert failed.errors.keys() == {request.request_id for request in model.requests}
        hook.remove()
        model.check(runner)


def test_random_requests_leave_the_bytes_that_they_found(models: Callable[[str], Model], copies: CheckedCopies) -> None:
    model, dice = models("pictures"), random.Random(5)
    runner = model.start(**OFFLOAD)
    before = device_bytes(runner), copies.slot_bytes, offload_of(runner).num_host_bytes, kept(runner)
    requests = [
        replace(
            dice.choice(model.requests),
            request_id=str(number),
            height=16 * dice.randint(1, 3),
            width=16 * dice.randint(1, 3),
            num_inference_steps=dice.randint(1, 3),
            seed=number,
        )
        for number in range(300)
    ]
    arrivals: dict[int, list[DiffusionRequest]] = {step: [] for step in range(60)}
    for request in requests:
        arrivals[dice.randrange(60)].append(request)
    drive = Drive(runner).run(arrivals)
    assert len(drive.images) == 300
    assert (device_bytes(runner), copies.slot_bytes, offload_of(runner).num_host_bytes, kept(runner)) == before
    model.check(runner)


def test_a_start_says_what_streams(
    models: Callable[[str], Model], copies: CheckedCopies, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm_omni"):
        models("pictures").start(enable_layerwise_offload=True, resident_layers=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("offload: ")]
    assert [line.split(" stream from")[0] for line in lines[:3]] == [
        "offload: 3 of 5 blocks",
        "offload: 10 of 10 layers that run once a timestep or text",
        "offload: 2 of 2 layers of encoders",
    ]
    assert any("without CUDA graphs" in line for line in lines)
    assert any(line.startswith("offload: a step copies its blocks in ") for line in lines)
