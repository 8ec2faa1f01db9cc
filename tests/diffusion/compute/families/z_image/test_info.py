"""Model info read from a folder, and folders and parallel degrees that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.z_image.info import describe
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError


def changed(model: Path, tmp_path: Path, component: str, **values: object) -> Path:
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("default_sampling*"))
    (file,) = (folder / component).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def real(turbo: Path, tmp_path: Path) -> PackedModelInfo:
    """The sizes of the published models."""
    sizes = {"dim": 3840, "n_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
    return describe(changed(turbo, tmp_path, "transformer", **sizes))


def test_sizes_and_defaults_of_the_distilled_model(turbo: Path, tmp_path: Path) -> None:
    info = real(turbo, tmp_path)
    assert (info.family, info.size_multiple, info.pixels_per_token, info.num_heads) == ("z_image", 16, 16, 30)
    assert info.head_dim == 128
    assert (info.max_prompt_tokens, info.attention_tokens) == (1504, 6 * 3840)
    assert info.num_sequence_tokens(33, 4096) == 64 + 4096
    assert info.default_sampling_params == {
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "max_sequence_length": 512,
    }


def test_the_other_schedule_is_the_model_that_wants_guidance(base: Path, turbo: Path) -> None:
    params = load_model_info(str(base)).default_sampling_params
    assert (params["num_inference_steps"], params["guidance_scale"], params["height"]) == (50, 5.0, 64)
    assert load_model_info(str(turbo)).default_sampling_params["num_inference_steps"] == 8


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            "--tensor-parallel-size takes 1, 2 with this model's transformer, whose 10240 MLP channels cannot be "
            "divided by 3, got 3",
        ),
        (
            {"tensor_parallel_size": 4},
            "--tensor-parallel-size takes 1, 2 with this model's transformer, whose 30 attention heads cannot be "
            "divided by 4, got 4",
        ),
        (
            {"tensor_parallel_size": 5},
            "--tensor-parallel-size takes 1, 2 with this model's transformer, whose 30 attention heads and 10240 MLP "
            "channels are shared by at most 2 ranks, got 5",
        ),
        ({"ulysses_degree": 31}, "--usp takes 1 to 30, the model's 30 heads over --tensor-parallel-size 1, got 31"),
        (
            {"ulysses_degree": 16, "tensor_parallel_size": 2},
            "--usp takes 1 to 15, the model's 30 heads over --tensor-parallel-size 2, got 16",
        ),
    ],
)
def test_degrees_that_the_model_does_not_allow_are_refused(
    turbo: Path, tmp_path: Path, degrees: dict[str, int], message: str
) -> None:
    info = real(turbo, tmp_path)
    info.check_parallel(DiffusionParallelConfig(ulysses_degree=4, ring_degree=2, tensor_parallel_size=2))
    with pytest.raises(ConfigError) as caught:
        info.check_parallel(DiffusionParallelConfig(**degrees))
    assert str(caught.value) == message


def test_odd_heads_cannot_be_shared(turbo: Path) -> None:
    with pytest.raises(
        ConfigError, match="takes 1 with this model's transformer, whose 3 attention heads cannot be divided by 2"
    ):
        load_model_info(str(turbo)).check_parallel(DiffusionParallelConfig(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("transformer", "siglip_feat_dim", 1152),
        ("transformer", "all_patch_size", [2, 4]),
        ("transformer", "qk_norm", False),
        ("scheduler", "stochastic_sampling", True),
    ],
)
def test_variants_that_need_more_are_refused(
    turbo: Path, tmp_path: Path, component: str, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match="not available yet"):
        describe(changed(turbo, tmp_path, component, **{key: value}))
