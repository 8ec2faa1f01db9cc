"""Sleep of whole runners: nothing stays on the device, and pictures afterwards are bit for bit those of before."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, kept, make_request
from testbed.slow_cases import slow_unless
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_edit_models import request_of
from testbed.tiny_models import photo
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.test_cuda_graphs import ARRIVALS, Capturer
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_layouts import BUILDERS, VIDEO_ARRIVALS
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.movable_weights import MovableWeights
from vllm_omni.diffusion.compute.families.diffusers_fallback.pipeline import DiffusersPipeline
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.diffusion.messages.weights_moved import ANOTHER_RANK, WeightsMoved
from vllm_omni.diffusion.messages.worker import RankInfo

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL_BYTES = 70_000
"""Tables of noise schedulers, which lie in host memory."""


def start(path: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    runner.pipeline.drop_caches()  # the warm-up computes rows of modulation in other batches, which round otherwise
    return runner


def draw(runner: ModelRunner, arrivals: Mapping[int, Sequence[DiffusionRequest]]) -> dict[str, np.ndarray]:
    drive = Drive(runner).run(arrivals)
    assert not drive.errors
    return {request_id: picture.copy() for request_id, picture in drive.images.items()}


def check_equal(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for request_id, picture in wanted.items():
        assert np.array_equal(got[request_id], picture), request_id


def storages() -> dict[int, torch.UntypedStorage]:
    """All tensors' memory in this process, by address."""
    gc.collect()
    found = (obj.untyped_storage() for obj in gc.get_objects() if type(obj) in (torch.Tensor, torch.nn.Parameter))
    return {storage.data_ptr(): storage for storage in found}


def packed(runner: ModelRunner) -> FlowPipeline[Any, Any, Any]:
    assert isinstance(runner.pipeline, FlowPipeline)
    return runner.pipeline


def weights_of(runner: ModelRunner) -> list[torch.Tensor]:
    modules = [module for modules in packed(runner).components.values() for module in modules]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]


def num_bytes_besides(runner: ModelRunner, before: set[int]) -> int:
    """Bytes of tensors that are neither weights nor among `before`."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in weights_of(runner)}
    return sum(storage.nbytes() for place, storage in storages().items() if place not in weights | before)


def arrivals_of(family: str, path: Path) -> Mapping[int, Sequence[DiffusionRequest]]:
    if family == "wan":
        return VIDEO_ARRIVALS
    if family != "edit":
        return ARRIVALS
    one, two = photo(90, 60, 1), photo(31, 70, 2)
    return {0: [request_of(path, "guided", [one], negative_prompt="x"), request_of(path, "two", [two, one])]}


@pytest.mark.parametrize(
    "family", [slow_unless(name, "qwen_image") for name in ("qwen_image", "z_image", "wan", "edit")]
)
def test_pictures_are_the_same_after_a_sleep(tmp_path: Path, family: str, tiny_edit_model: Path) -> None:
    path = tiny_edit_model if family == "edit" else BUILDERS[family](tmp_path / "model")
    arrivals, before = arrivals_of(family, path), set(storages())
    runner = start(path)
    wanted = draw(runner, arrivals)
    pipeline = packed(runner)
    for _ in range(2):
        assert any(len(cache) for cache in pipeline._prompt_caches)
        report = runner.sleep()
        assert not any(len(cache) for cache in pipeline._prompt_caches)
        assert not any(table.num_bytes for table in pipeline._modulations)
        weights = weights_of(runner)
        assert sum(tensor.nbytes for tensor in weights) <= report.num_bytes
        num_runs = len({tensor.untyped_storage().data_ptr() for tensor in weights})
        assert num_runs == len(pipeline.components), "one run of host memory for each component"
        assert num_bytes_besides(runner, before) < SMALL_BYTES
        back = runner.wake_up()
        assert (back.num_bytes, back.failure) == (report.num_bytes, "")
        check_equal(draw(runner, arrivals), wanted)


@pytest.mark.parametrize("family", [slow_unless(name, "qwen_image") for name in ("qwen_image", "wan")])
@pytest.mark.parametrize("flag", ["enable_cpu_offload", "enable_layerwise_offload"])
def test_offloaded_weights_leave_nothing_on_the_device(tmp_path: Path, flag: str, family: str) -> None:
    path = BUILDERS[family](tmp_path / "model")
    arrivals = arrivals_of(family, path)
    runner = start(path, **{flag: True})
    pipeline = packed(runner)
    wanted = draw(runner, arrivals)
    for _ in range(2):
        runner.sleep()
        if (offload := pipeline.layer_offload) is None:
            assert pipeline.turns.residency.present == ()
        else:
            runs = {run.data_ptr() for unit in offload.streamed_units for run in [unit.run]}
            starts = {tensor.untyped_storage().data_ptr() for tensor in offload.streamed_tensors}
            assert starts == runs, "streamed weights are in host memory"
        assert runner.wake_up().failure == ""
        check_equal(draw(runner, arrivals), wanted)


def test_requests_under_way_are_dropped(tiny_model: Path) -> None:
    runner = start(tiny_model)
    requests: list[DiffusionRequest] = [make_request("a"), make_request("b", seed=5)]
    wanted = draw(runner, {0: requests})
    runner.execute(StepPlan(100, new_requests=requests, encode=["a", "b"]))
    runner.execute(StepPlan(101, denoise=["a", "b"]))
    runner.abort(["a"])
    runner.sleep()
    assert kept(runner) == 0
    runner.wake_up()
    check_equal(draw(runner, {0: requests}), wanted)


def test_captured_graphs_are_dropped_and_captured_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = Capturer()
    monkeypatch.setattr(Device, "capturer", lambda self: capturer)
    runner = start(tiny_model)
    capturer.num_captures = 0
    wanted = draw(runner, ARRIVALS)
    num_captures, num_releases = capturer.num_captures, capturer.num_releases
    assert num_captures
    runner.sleep()
    assert capturer.num_releases == num_releases + 1
    runner.wake_up()
    check_equal(draw(runner, ARRIVALS), wanted)
    assert capturer.num_captures == 2 * num_captures


def test_adapters_are_dropped_and_read_again(tiny_model: Path, tmp_path: Path) -> None:
    pairs = random_pairs(transformer_of(tiny_model), 1, size=0.5)
    lora = LoRA("ink", str(save_peft(pairs, tmp_path / "ink.safetensors")), 0.8)
    runner = start(tiny_model, lora_modules={"ink": lora.path})
    arrivals = {0: [make_request("plain"), make_request("ink", loras=(lora,))]}
    wanted = draw(runner, arrivals)
    assert not np.array_equal(wanted["plain"], wanted["ink"])
    runner.sleep()
    store = packed(runner)._adapters
    assert not store._host
    assert not store._loaded
    runner.wake_up()
    check_equal(draw(runner, arrivals), wanted)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_whole_pipelines_sleep(tmp_path: Path) -> None:
    path = build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path / "model")
    runner = start(path)
    arrivals = {0: [make_request("a", true_cfg_scale=1.0, max_sequence_length=64)]}
    wanted = draw(runner, arrivals)
    runner.execute(StepPlan(100, new_requests=[make_request("b", true_cfg_scale=1.0)], encode=["b"]))
    report = runner.sleep()
    assert isinstance(runner.pipeline, DiffusersPipeline)
    assert not runner.pipeline._calls
    modules = [m for m in runner.pipeline.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert report.num_bytes >= sum(p.nbytes for m in modules for p in m.parameters())
    assert runner.wake_up().num_bytes == report.num_bytes
    check_equal(draw(runner, arrivals), wanted)


def test_a_closed_runner_frees_its_memory(tiny_model: Path) -> None:
    before = set(storages())
    runner = start(tiny_model)
    draw(runner, {0: [make_request("a")]})
    runner.sleep()
    runner.close()
    assert sum(storage.nbytes() for place, storage in storages().items() if place not in before) < SMALL_BYTES


def sleep_and_wake(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path
) -> tuple[list[WeightsMoved], dict[str, np.ndarray], dict[str, np.ndarray]]:
    runner = started(place, parallel, path)
    runner.pipeline.drop_caches()
    merge = merging(runner)
    requests = [make_request("a", negative_prompt="x"), make_request("b", seed=2)]
    before = Drive(runner, merge=merge).run({0: requests})
    moves = [runner.sleep()]
    lacking = patch.object(MovableWeights, "reserve", side_effect=torch.OutOfMemoryError("no room"))
    if place.rank == 1:
        with lacking:
            moves.append(runner.wake_up())
    else:
        moves.append(runner.wake_up())
    moves.append(runner.wake_up())
    after = Drive(runner, merge=merge).run({0: requests})
    assert not before.errors | after.errors
    return moves, before.images, after.images


@pytest.mark.parametrize("axis", ["ulysses_degree", pytest.param("tensor_parallel_size", marks=pytest.mark.thorough)])
def test_all_ranks_wake_up_or_none(tmp_path: Path, axis: str) -> None:
    path = BUILDERS["qwen_image"](tmp_path / "model", heads=4)
    parallel = DiffusionParallelConfig(**{axis: 2})
    for rank, (moves, before, after) in enumerate(run_places(sleep_and_wake, parallel, parallel, path)):
        asleep, lacking, awake = moves
        assert asleep.num_bytes == awake.num_bytes > 0
        assert (asleep.failure, awake.failure) == ("", "")
        wanted = (
            ANOTHER_RANK if rank == 0 else f"the weights take {asleep.num_bytes / 1e9:.1f} GB of device memory: no room"
        )
        assert (lacking.num_bytes, lacking.failure) == (0, wanted)
        check_equal(after, before)
