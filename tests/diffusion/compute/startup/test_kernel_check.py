"""Fused kernels are tried before weights are read, and compiled before the first request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.kinds import Device
from vllm_omni.diffusion.compute.families.qwen_image import pipeline
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels, fused
from vllm_omni.diffusion.compute.layers.rounding import Rows
from vllm_omni.diffusion.compute.startup import kernel_check as kernels
from vllm_omni.diffusion.compute.startup.kernel_check import check_kernels
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError


class Recording(TorchKernels):
    """Kinds of arguments that the kernels saw: Triton compiles a kernel for each."""

    picks_rows = True

    def __init__(self) -> None:
        self.kinds: set[tuple[str, bool]] = set()

    def norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, *rest: Any) -> Rows:
        self.kinds.add(("norm_modulate", rows is None))
        return super().norm_modulate(x, shift, scale, rows, *rest)

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None, *rest: Any) -> Tensor:
        _, places = rest if len(rest) == 2 else (None, None)
        self.kinds |= {("gated_add", rows is None), ("picking", places is None)}
        return super().gated_add(x, y, gate, rows, *rest)

    def heads(self, streams: Any, order: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.kinds.add(("heads", order is None))
        return super().heads(streams, order, *rest)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, quick_warmup: None) -> None:
    monkeypatch.setattr(Device, "kernels", lambda self, choice: "triton")


def runner_of(path: Path) -> ModelRunner:
    return ModelRunner(OmniDiffusionConfig(model=str(path)), load_model_info(str(path)))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_warm_up_runs_the_kernels_with_arguments_of_every_kind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording()
    monkeypatch.setattr(pipeline, "create_kernels", lambda name: recording)
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
    monkeypatch.setattr(pipeline.Pipeline, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        ConfigError,
        match=r"^--kernels triton does not run here: RuntimeError Failed to find C compiler\.; --kernels torch does$",
    ):
        runner_of(tiny_model).start()


def test_kernels_that_run_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels("triton", Device(), torch.float32)
    monkeypatch.setattr(kernels, "create_kernels", lambda name: pytest.fail("Triton is not asked for"))
    check_kernels("torch", Device(), torch.float32)
