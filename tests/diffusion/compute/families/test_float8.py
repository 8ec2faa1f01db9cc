"""`--quantization fp8` of the packed transformers: diffusers' with rounded layers, ranks, memory while loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from testbed.live_bytes import LiveBytes
from testbed.runner_driver import Drive, make_request, psnr, quick_executor
from testbed.tiny_models import photo, tiny_transformer
from testbed.tiny_wan import tiny_wan_transformer
from testbed.tiny_z_image import tiny_z_image_transformer
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.qwen_image import test_transformer as qwen_image
from tests.diffusion.compute.families.z_image import test_transformer as z_image
from tests.diffusion.compute.worker.replica import started
from tests.diffusion.compute.worker.test_layouts import ARRIVALS, BUILDERS, first_velocities, placed_in_turn
from tests.float8 import round_linears
from vllm_omni import Omni
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image import transformer as qwen_image_model
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.wan import transformer as wan_model
from vllm_omni.diffusion.compute.families.wan.config import WanConfig
from vllm_omni.diffusion.compute.families.z_image import transformer as z_image_model
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

CPU = torch.device("cpu")
CONFIGS: dict[type[nn.Module], Any] = {
    qwen_image_model.QwenImageTransformer: QwenImageConfig,
    z_image_model.ZImageTransformer: ZImageConfig,
    wan_model.WanTransformer: WanConfig,
}
GRIDS = [(4, 4), (8, 6), (3, 5)]
LENGTHS = [9, 12, 40]
TIMESTEPS = [0.9, 0.1, 0.5]


def load(
    folder: Path,
    config: Any,
    family: Any,
    cls: type[nn.Module],
    float8: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """float64, where sums do not differ enough to fall on the other side of a rounding."""
    with torch.device("meta"):
        ours = cls(CONFIGS[cls].from_dict(config), Group.alone())
    layers = family.FLOAT8_LAYERS if float8 else ()
    load_weights(ours, folder, family.CHECKPOINT_NAMES, CPU, dtype, float8=layers)
    return ours


def check(with_float8: list[Tensor], plain: list[Tensor], oracle: list[Tensor]) -> None:
    for got, unrounded, want in zip(with_float8, plain, oracle, strict=True):
        assert (unrounded - want).norm() > 0.003 * want.norm()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_qwen_image_rounds_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = tiny_transformer(heads=3, layers=3).double()
    theirs.save_pretrained(tmp_path)
    cls = qwen_image_model.QwenImageTransformer
    ours, plain = (load(tmp_path, theirs.config, qwen_image_model, cls, float8) for float8 in (True, False))
    assert round_linears(theirs, r"^transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\.") == 3 * 12
    latents, texts = [torch.randn(h * w, 64).double() for h, w in GRIDS], [torch.randn(n, 32).double() for n in LENGTHS]
    with torch.inference_mode():
        oracle = [
            theirs(
                hidden_states=x[None],
                encoder_hidden_states=text[None],
                timestep=torch.tensor([timestep]).double(),
                img_shapes=[[(1, *grid)]],
                return_dict=False,
            )[0][0]
            for x, text, timestep, grid in zip(latents, texts, TIMESTEPS, GRIDS)
        ]
    packed = [qwen_image.packed(m, latents, texts, TIMESTEPS, [[grid] for grid in GRIDS]) for m in (ours, plain)]
    check(packed[0], packed[1], oracle)


def test_z_image_rounds_its_layers_and_refiners_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = tiny_z_image_transformer(heads=3, layers=3).double()
    theirs.save_pretrained(tmp_path)
    cls = z_image_model.ZImageTransformer
    ours, plain = (load(tmp_path, theirs.config, z_image_model, cls, float8) for float8 in (True, False))
    assert round_linears(theirs, r"^(layers|\w+_refiner)\.\d+\.(attention|feed_forward)\.") == 7 * (3 + 2 + 2)
    latents = [torch.randn(16, 1, 2 * h, 2 * w).double() for h, w in GRIDS]
    texts = [torch.randn(n, 32).double() for n in LENGTHS]
    with torch.inference_mode():
        oracle = [
            pack_latents(
                theirs([x], torch.tensor([t]).double(), [text], return_dict=False)[0][0][:, 0], channels_last=True
            )
            for x, text, t in zip(latents, texts, TIMESTEPS)
        ]
    tokens = [pack_latents(x[:, 0], channels_last=True) for x in latents]
    packed = [z_image.packed(model, tokens, texts, TIMESTEPS, GRIDS) for model in (ours, plain)]
    check(packed[0], packed[1], oracle)


LAYOUTS = [{"tensor_parallel_size": 2}, {"ulysses_degree": 2}]


def velocities(place: RankInfo, parallel: DiffusionParallelConfig, path: Path, settings: dict[str, Any]) -> Any:
    runner = started(place, parallel, path, **settings)
    return first_velocities(runner, lambda *args: placed_in_turn(1, *args), ARRIVALS)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
@pytest.mark.parametrize("family", BUILDERS)
def test_ranks_say_what_one_says_as_nearly_as_float8_does(tmp_path: Path, family: str, layout: dict[str, int]) -> None:
    """Tensor ranks round shares of rows on their own; those that share a sequence round as one does."""
    path = BUILDERS[family](tmp_path / "model", heads=6)
    alone, parallel = DiffusionParallelConfig(), DiffusionParallelConfig(**layout)
    ((exact,), (one,)) = (run_places(velocities, alone, alone, path, s) for s in ({}, {"quantization": "fp8"}))
    ranks = run_places(velocities, parallel, parallel, path, {"quantization": "fp8"})
    for name, want in exact.items():
        rounding = np.linalg.norm(one[name] - want)
        assert rounding > 0.003 * np.linalg.norm(want)
        for rank in ranks:
            assert np.array_equal(rank[name], ranks[0][name])
        if parallel.tensor_parallel_size > 1:
            assert np.linalg.norm(ranks[0][name] - want) < 1.5 * rounding
        else:
            assert np.linalg.norm(ranks[0][name] - one[name]) < 0.3 * rounding


def test_pictures_are_near_and_come_with_a_cache_as_well(tiny_model: Path) -> None:
    request = make_request("a", negative_prompt="a blue car", num_inference_steps=8)
    cached = {"cache_backend": "cache_dit", "cache_config": {"residual_diff_threshold": 1000.0}}
    pictures = []
    for settings in ({}, {"quantization": "fp8"}, {"quantization": "fp8", **cached}):
        runner = started(RankInfo(), DiffusionParallelConfig(), tiny_model, **settings)
        drive = Drive(runner).run({0: [request]})
        assert not drive.errors
        pictures.append(drive.images["a"])
    assert 15 < psnr(pictures[0], pictures[1]) < 60
    assert not np.array_equal(pictures[1], pictures[2])


def test_edits_are_near(tiny_edit_model: Path) -> None:
    prompt = {"prompt": "a blue car", "multi_modal_data": {"image": photo(64, 48, seed=0)}}
    params = OmniDiffusionSamplingParams(seed=0)
    pictures = []
    choices: list[dict[str, Any]] = [{}, {"quantization": "fp8"}]
    for settings in choices:
        with (
            patch("vllm_omni.omni.make_executor", quick_executor),
            Omni(
                model=str(tiny_edit_model), distributed_executor_backend="uni", progress_bar=False, **settings
            ) as omni,
        ):
            pictures.append(np.asarray(omni.generate(prompt, params)[0].images[0]))
    assert 15 < psnr(*pictures) < 60


FAMILIES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "qwen_image": (lambda: tiny_transformer(heads=8, layers=4), qwen_image_model, "QwenImageTransformer"),
    "z_image": (lambda: tiny_z_image_transformer(heads=8, layers=4), z_image_model, "ZImageTransformer"),
    "wan": (lambda: tiny_wan_transformer(heads=8, layers=4), wan_model, "WanTransformer"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_rounded_one_by_one_as_they_are_read(tmp_path: Path, name: str) -> None:
    build, family, cls = FAMILIES[name]
    theirs = build()
    theirs.save_pretrained(tmp_path)
    with LiveBytes() as live:
        ours = load(tmp_path, theirs.config, family, getattr(family, cls), dtype=torch.float32)
    tensors = [*ours.parameters(), *ours.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    largest = max(parameter.nbytes for parameter in theirs.parameters())
    in_float8 = [tensor for tensor in tensors if tensor.dtype == torch.float8_e4m3fn]
    blocks = sum(parameter.numel() for parameter in theirs.parameters() if parameter.dim() == 2) * 0.5
    assert sum(tensor.numel() for tensor in in_float8) > blocks
    # The tensor as it is stored, its magnitudes or its quotients, and what they are rounded to.
    assert held < live.peak < held + 2.5 * largest
    assert live.peak < 0.75 * sum(parameter.nbytes for parameter in theirs.parameters())
