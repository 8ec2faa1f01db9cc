"""Model info read from a folder; variants and sizes that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.tiny_models import photo
from testbed.tiny_wan import KINDS
from tests.diffusion.control.builders import READY
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.weight_files import stored_weights
from vllm_omni.diffusion.compute.families.wan.config import UMT5Config, WanConfig
from vllm_omni.diffusion.compute.families.wan.info import describe
from vllm_omni.diffusion.control.default_checks import check_defaults
from vllm_omni.diffusion.control.frames import FrameLimits
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

FULL_SIZE = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "freq_dim": 256}
"""Sizes of the published 14B models."""
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def changed(model: Path, tmp_path: Path, file: str, **values: object) -> Path:
    """Copy of `model` with other values in one of its JSON files."""
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(content))
    return folder


def real(model: Path, tmp_path: Path) -> PackedModelInfo:
    """Info of a model with the sizes of the published 14B models."""
    for component in ("transformer", "transformer_2"):
        if (model / component).exists():
            seen = {"added_kv_proj_dim": 5120} if (model / "image_encoder").exists() else {}
            changed(model, tmp_path, f"{component}/config.json", **FULL_SIZE, **seen, text_dim=4096)
    return describe(changed(model, tmp_path, "text_encoder/config.json", **UMT5_XXL))


def test_sizes_and_defaults_of_the_published_model(wan_model: Callable[[str], Path], tmp_path: Path) -> None:
    info = real(wan_model("t2v-2.1"), tmp_path)
    assert (info.family, info.size_multiple, info.pixels_per_token, info.frame_multiple) == ("wan", 16, 16, 4)
    assert (info.num_heads, info.head_dim, info.num_blocks) == (40, 128, 40)
    assert (info.max_prompt_tokens, info.attention_tokens) == (512, 3 * 5120 + 13824)
    assert info.num_image_tokens(720, 1280, 81) == 75_600
    assert info.num_sequence_tokens(512, 75_600) == 75_600
    assert info.makes_videos
    assert info.default_fps == 16
    assert info.tea_cache_coefficients is None
    assert info.default_sampling_params == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "max_sequence_length": 512,
    }
    assert info.image_input is None
    assert {"guidance_scale", "flow_shift", "sigmas", "num_frames"} <= set(info.parameters)
    assert "guidance_scale_2" not in info.parameters


@pytest.mark.parametrize("kind", ["ti2v-5b", "i2v-5b"])
def test_defaults_of_the_model_of_5b_parameters_are_those_of_its_card(
    wan_model: Callable[[str], Path], kind: str
) -> None:
    info, config = describe(wan_model(kind)), OmniDiffusionConfig("model")
    defaults = info.default_sampling_params
    assert (defaults["width"], defaults["height"], defaults["num_frames"]) == (1280, 704, 121)
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], info.default_fps) == (50, 5.0, 24)
    assert FrameLimits.of(config, info).most == 121
    check_defaults(config, info)


def test_guidance_needs_no_negative_prompt(wan_model: Callable[[str], Path]) -> None:
    guidance = describe(wan_model("t2v-a14b")).guidance
    assert guidance.resolved(5.0, None) == (5.0, "")
    assert guidance.resolved(1.0, "blurred") == (1.0, "blurred")
    assert guidance.parameters == ("guidance_scale", "guidance_scale_2")


@pytest.mark.parametrize(
    ("kind", "images", "components"),
    [
        ("t2v-2.1", None, []),
        ("t2v-a14b", None, ["transformer_2"]),
        ("ti2v-5b", (0, 1), []),
        ("i2v-2.1", (1, 1), ["image_encoder"]),
        ("flf2v-2.1", (2, 2), ["image_encoder"]),
        ("i2v-a14b", (1, 2), ["transformer_2"]),
        ("i2v-5b", (1, 1), []),
    ],
)
def test_every_kind_of_model(
    wan_model: Callable[[str], Path], kind: str, images: tuple[int, int] | None, components: list[str]
) -> None:
    path = wan_model(kind)
    info = describe(path)
    is_5b = KINDS[kind].is_5b
    assert (info.size_multiple, info.default_fps) == ((32, 24) if is_5b else (16, 16))
    got = info.image_input
    assert (None if got is None else (got.min_images, got.max_images)) == images
    assert sorted(info.expected_weights) == sorted(["transformer", "vae", "text_encoder", *components])
    for component, expected in info.expected_weights.items():
        for weights in expected:
            weights.check(component, stored_weights(path / component))


@pytest.mark.parametrize(
    ("kind", "count", "frames", "encoded_frames"),
    [("i2v-2.1", 1, 9, 9), ("flf2v-2.1", 2, 9, 9), ("i2v-a14b", 2, 5, 5), ("i2v-5b", 1, 9, 1), ("ti2v-5b", 1, 9, 1)],
)
def test_pictures_are_no_tokens_and_their_encode_is_priced_by_the_request(
    wan_model: Callable[[str], Path], kind: str, count: int, frames: int, encoded_frames: int
) -> None:
    info = describe(wan_model(kind))
    builder = RequestBuilder(OmniDiffusionConfig("model"), info, READY)
    params = OmniDiffusionSamplingParams(height=64, width=96, num_frames=frames, num_outputs_per_prompt=2)
    with_images = OmniPrompt("red", images=(photo(80, 60, 1), photo(50, 70, 2))[:count])
    first, second = builder.build(with_images, params, "r")
    tokens = 64 * 96 // info.pixels_per_token**2
    prompts = READY.encode_units_per_token * 2 * 512
    assert first.cost == second.cost
    assert first.cost.encode == (prompts + READY.decode_units_per_token * encoded_frames * tokens) / 2
    is_cut = encoded_frames > 1
    assert first.num_encoded_frames == (first.num_latent_frames if is_cut else 1)
    assert first.cost.encode_video == pytest.approx(first.cost.encode - prompts / 2 if is_cut else 0)
    if is_cut:  # each output pays its share, and a latent frame costs as much as its decode
        assert 2 * first.encoded_frame_cost == pytest.approx(first.frame_cost)
    assert first.num_reference_tokens == 0
    assert [image.reference.shape for image in first.request.images] == [(64, 96, 3)] * count
    assert first.request.images is second.request.images
    assert first.cost.branch_tokens == (first.num_image_tokens,) * 2


def test_a_folders_own_defaults_come_first(wan_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(wan_model("t2v-2.1"), tmp_path / "model")
    (folder / "default_sampling_params.json").write_text('{"num_frames": 17, "height": 64}')
    params = describe(folder).default_sampling_params
    assert (params["num_frames"], params["height"], params["width"]) == (17, 64, 832)


def test_degrees_follow_from_the_sizes(wan_model: Callable[[str], Path], tmp_path: Path) -> None:
    info = real(wan_model("t2v-2.1"), tmp_path)
    assert info.tensor_shares.sizes == (1, 2, 4, 8)
    assert info.text_encoder_shares.sizes == (1, 2, 4, 8, 16, 32, 64)
    info.check_parallel(DiffusionParallelConfig(ulysses_degree=5, tensor_parallel_size=8))
    with pytest.raises(ConfigError, match="whose 40 attention heads cannot be divided by 3, got 3"):
        info.check_parallel(DiffusionParallelConfig(tensor_parallel_size=3))


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("t2v-2.1", "transformer/config.json", {"patch_size": [1, 4, 4]}, r"patch_size=\[1, 4, 4\]: not available yet"),
        ("t2v-2.1", "transformer/config.json", {"cross_attn_norm": False}, "cross_attn_norm=False: not available yet"),
        ("t2v-2.1", "transformer/config.json", {"qk_norm": None}, "qk_norm=None: not available yet"),
        ("t2v-2.1", "transformer/config.json", {"in_channels": 36}, "in_channels takes 16, .*, got 36"),
        ("i2v-a14b", "transformer/config.json", {"in_channels": 16}, "different ones"),
        ("t2v-a14b", "transformer_2/config.json", {"ffn_dim": 64}, "different ones"),
        ("i2v-5b", "transformer/config.json", {"out_channels": 16}, "out_channels takes 12, .*, got 16"),
        ("t2v-2.1", "transformer/config.json", {"text_dim": 64}, "text_dim takes 32, .*, got 64"),
        ("t2v-2.1", "transformer/config.json", {"image_dim": 32, "added_kv_proj_dim": 48}, "image_dim takes null"),
        ("flf2v-2.1", "transformer/config.json", {"pos_embed_seq_len": 12}, "pos_embed_seq_len takes 10, .*, got 12"),
        ("i2v-2.1", "image_encoder/config.json", {"hidden_size": 64}, "hidden_size takes 32, .*, got 64"),
        ("i2v-2.1", "image_processor/preprocessor_config.json", {"resample": 2}, "resample=2: not avail.*, only 3 is"),
        ("i2v-2.1", "image_processor/preprocessor_config.json", {"do_resize": False}, "do_resize=False: not avail"),
        ("i2v-2.1", "image_processor/preprocessor_config.json", {"size": {"height": 8, "width": 8}}, "size takes"),
        ("i2v-2.1", "image_processor/preprocessor_config.json", {"size": "x"}, "size takes .*, got 'x'"),
        ("t2v-2.1", "model_index.json", {"boundary_ratio": 0.9}, "got 0.9 without a transformer_2"),
        ("t2v-a14b", "model_index.json", {"boundary_ratio": None}, "got None with a transformer_2"),
        ("t2v-a14b", "model_index.json", {"boundary_ratio": 1.5}, "got 1.5 with a transformer_2"),
        ("t2v-a14b", "model_index.json", {"boundary_ratio": "x"}, "boundary_ratio takes a number, got 'x'"),
        ("ti2v-5b", "model_index.json", {"expand_timesteps": 1}, "expand_timesteps takes true or false, got 1"),
        ("t2v-2.1", "model_index.json", {"transformer": [None, None]}, "has no transformer"),
        ("t2v-2.1", "vae/config.json", {"scale_factor_spatial": 16}, "scale_factor_spatial takes 8, .*, got 16"),
        ("ti2v-5b", "vae/config.json", {"scale_factor_temporal": 8}, "scale_factor_temporal takes 4, .*, got 8"),
        ("ti2v-5b", "vae/config.json", {"out_channels": 3}, "takes? 12 with patch_size 2, got 12 and 3"),
        ("t2v-2.1", "vae/config.json", {"temperal_downsample": [True]}, "temperal_downsample takes 3 values"),
        ("t2v-2.1", "text_encoder/config.json", {"feed_forward_proj": "relu"}, "feed_forward_proj='relu': not avail"),
        (
            "t2v-2.1",
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "has DDIMScheduler: not avail",
        ),
    ],
)
def test_variants_and_sizes_that_do_not_fit_are_refused(
    wan_model: Callable[[str], Path], tmp_path: Path, kind: str, file: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(changed(wan_model(kind), tmp_path, file, **values))


def test_weights_of_other_sizes_are_refused(wan_model: Callable[[str], Path]) -> None:
    path = wan_model("t2v-2.1")
    transformer = WanConfig.from_dict(json.loads((path / "transformer" / "config.json").read_text()))
    wider = replace(transformer, ffn_dim=2 * transformer.ffn_dim)
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.net\.0\.proj\.bias has shape \(96,\)"):
        wider.expected_weights().check("transformer", stored_weights(path / "transformer"))
    encoder = UMT5Config.from_dict(json.loads((path / "text_encoder" / "config.json").read_text()))
    with pytest.raises(ConfigError, match=r"num_layers is 3, but the weight files have 2 encoder\.block"):
        replace(encoder, num_layers=3).expected_weights().check("text_encoder", stored_weights(path / "text_encoder"))


def test_facts_are_read_without_torch(wan_model: Callable[[str], Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from vllm_omni.diffusion.compute.families.wan.info import describe; "
        f"describe(Path({str(wan_model('i2v-2.1'))!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
