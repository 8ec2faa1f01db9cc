"""Resolved configs; fused kernels are tried before weights are read and compiled before the first request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.runner_driver import QUICK
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.families import component_loader
from vllm_omni.diffusion.compute.families.qwen_image import pipeline
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels, fused
from vllm_omni.diffusion.compute.layers.rounding import Rows
from vllm_omni.diffusion.compute.startup import model_start
from vllm_omni.diffusion.compute.startup.model_start import check_device, check_kernels, resolve
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError


class Recording(TorchKernels):
    """Kernels that note the kinds of their arguments, for each of which Triton compiles code."""

    picks_rows = True

    def __init__(self) -> None:
        self.kinds: set[tuple[str, bool]] = set()

    def norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, *rest: Any) -> Rows:
        self.kinds.add(("norm_modulate", rows is None))
        return super().norm_modulate(x, shift, scale, rows, *rest)

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None, *rest: Any) -> Tensor:
        _, positions = rest if len(rest) == 2 else (None, None)
        self.kinds |= {("gated_add", rows is None), ("picking", positions is None)}
        return super().gated_add(x, y, gate, rows, *rest)

    def heads(self, streams: Any, order: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.kinds.add(("heads", order is None))
        return super().heads(streams, order, *rest)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "choose_kernels", lambda self, choice: "triton")


def runner_of(path: Path) -> ModelRunner:
    return ModelRunner(OmniDiffusionConfig(model=str(path)), load_model_info(str(path)), options=QUICK)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_warm_up_runs_kernels_with_every_kind_of_arguments(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording()
    monkeypatch.setattr(component_loader, "create_kernels", lambda name: recording)
    runner_of(tiny_model).start()
    assert recording.kinds == {
        (name, is_none) for name in ("norm_modulate", "gated_add", "picking", "heads") for is_none in (0, 1)
    }


@pytest.mark.usefixtures("as_on_a_gpu")
def test_kernels_that_do_not_run_end_the_start_before_weights_are_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(fused.TritonKernels, "gated_add", fails)
    monkeypatch.setattr(pipeline.QwenImagePipeline, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        ConfigError,
        match=r"^--kernels triton does not run here: RuntimeError Failed to find C compiler\.; --kernels torch does$",
    ):
        runner_of(tiny_model).start()


def test_kernels_that_run_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels("triton", Device(), torch.float32)
    monkeypatch.setattr(model_start, "create_kernels", lambda name: pytest.fail("Triton is not asked for"))
    check_kernels("torch", Device(), torch.float32)


def test_a_packed_family_gets_kernels_and_an_attention_backend(tiny_model: Path) -> None:
    config = OmniDiffusionConfig(model=str(tiny_model), device="cpu")
    resolved = resolve(config, load_model_info(str(tiny_model)), Device("cpu"), Ranks(), None)
    assert (resolved.kernels, resolved.attention_backend) == ("torch", "sdpa")
    assert replace(resolved, kernels="auto", attention_backend=None) == config


def test_a_whole_pipeline_keeps_the_attention_of_diffusers() -> None:
    info: Any = SimpleNamespace(whole="any")
    resolved = resolve(OmniDiffusionConfig(model="any", device="cpu"), info, Device("cpu"), Ranks(), "sdpa")
    assert (resolved.kernels, resolved.attention_backend) == ("torch", None)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"kernels": "triton"}, "--kernels triton takes a GPU, got cpu; auto and torch run here"),
        ({"overlap_decode": True}, "--overlap-decode takes a GPU, got cpu, which decodes between steps"),
    ],
)
def test_settings_that_need_a_gpu_are_refused_on_a_cpu(settings: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_device(OmniDiffusionConfig(model="any", device="cpu", **settings), Device("cpu"))
    assert str(refused.value) == refusal
