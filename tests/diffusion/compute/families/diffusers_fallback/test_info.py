"""Model info read from a folder in diffusers' layout, and components that are not loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)

from testbed.tiny_text_encoders import CLIP_TOKENS, T5_TOKENS
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import (
    frame_multiple,
    latent_side,
    longest_side,
    own_size,
)
from vllm_omni.diffusion.compute.families.diffusers_fallback.info import PromptTokenCounter
from vllm_omni.diffusion.compute.families.diffusers_fallback.pipeline import DiffusersPipeline, PipelineCall
from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError

SIZES = ("height", "width", "num_inference_steps")


@pytest.fixture
def copy_of(model_of: ModelOf, tmp_path: Path) -> Callable[..., Path]:
    """copy_of(class name, **changes): its folder with other entries in model_index.json (None: without it)."""

    def copy(name: str, **changes: Any) -> Path:
        folder = shutil.copytree(model_of(name), tmp_path / name)
        (folder / "default_sampling_params.json").unlink()
        index = {**json.loads((folder / "model_index.json").read_text()), **changes}
        kept = {key: value for key, value in index.items() if value is not None}
        (folder / "model_index.json").write_text(json.dumps(kept))
        return folder

    return copy


@pytest.mark.parametrize(
    ("name", "size_multiple", "side", "longest", "parameters"),
    [
        (
            "FluxPipeline",
            16,
            1024,
            T5_TOKENS,
            {"negative_prompt", "guidance_scale", "true_cfg_scale", "sigmas", "flow_shift", "max_sequence_length"},
        ),
        (
            "StableDiffusion3Pipeline",
            16,
            256,
            T5_TOKENS,
            {"negative_prompt", "guidance_scale", "sigmas", "flow_shift", "max_sequence_length"},
        ),
        ("StableDiffusionXLPipeline", 8, 128, CLIP_TOKENS, {"negative_prompt", "guidance_scale"}),
    ],
)
def test_a_folder_is_described(
    copy_of: Callable[..., Path], name: str, size_multiple: int, side: int, longest: int, parameters: set[str]
) -> None:
    info = load_model_info(str(copy_of(name)))
    assert (info.size_multiple, info.max_prompt_tokens) == (size_multiple, longest)
    assert set(info.parameters) == {*SIZES, *parameters}
    assert info.served_by == "diffusers"
    defaults = info.default_sampling_params
    assert (defaults["height"], defaults["width"]) == (side, side)
    assert defaults.get("max_sequence_length", longest) == longest  # no longer than the tokenizer's limit
    assert info.guidance.parameter == ("true_cfg_scale" if name == "FluxPipeline" else "guidance_scale")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("FluxPipeline", 4),
        ("StableDiffusion3Pipeline", 4),
        ("ChromaPipeline", 1),
        ("StableDiffusion3PAGPipeline", 1),
        ("StableDiffusionPipeline", 1),
    ],
)
def test_only_pipelines_that_were_seen_interleaved_run_several_requests(
    copy_of: Callable[..., Path], name: str, most: int
) -> None:
    """Others may change the model for the time of a call, as those with another attention (PAG) do."""
    info = load_model_info(str(copy_of("FluxPipeline", _class_name=name)))
    assert isinstance(info, WholeModelInfo)
    assert (info.pipeline.class_name, info.max_running) == (name, most)


def test_defaults_are_those_of_the_call(copy_of: Callable[..., Path]) -> None:
    defaults = load_model_info(str(copy_of("StableDiffusionXLPipeline"))).default_sampling_params
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (50, 5.0)


@pytest.mark.parametrize(
    ("transformer", "config", "longest"),
    [
        (SD3Transformer2DModel, {"pos_embed_max_size": 192}, 192 * 16),
        (AuraFlowTransformer2DModel, {"pos_embed_max_size": 96 * 96}, 96 * 16),
        (CogView4Transformer2DModel, {"pos_embed_max_size": 128}, None),  # it has no table
        (FluxTransformer2DModel, {}, None),
    ],
)
def test_a_table_of_positions_bounds_the_sides(
    transformer: type[Any], config: dict[str, int], longest: int | None
) -> None:
    assert longest_side({"transformer": transformer}, config, 16) == longest
    assert longest_side({}, {}, 16) is None


@pytest.mark.parametrize(
    ("name", "tokenizer", "longest"),
    [
        ("HunyuanVideo15Pipeline", "tokenizer", 1000),  # the other one counts the bytes of what is to be written
        ("HunyuanDiTPipeline", "tokenizer_2", T5_TOKENS),
    ],
)
def test_a_prompt_is_counted_as_the_class_cuts_it(model_of: ModelOf, name: str, tokenizer: str, longest: int) -> None:
    info = load_model_info(str(model_of(name)))
    counter = info.count_prompt_tokens
    assert isinstance(counter, PromptTokenCounter)
    assert (counter.folder.name, info.max_prompt_tokens) == (tokenizer, longest)


def test_without_t5_the_limit_is_clips(copy_of: Callable[..., Path]) -> None:
    absent = [None, None]
    info = load_model_info(str(copy_of("StableDiffusion3Pipeline", tokenizer_3=absent, text_encoder_3=absent)))
    assert info.max_prompt_tokens == info.default_sampling_params["max_sequence_length"] == CLIP_TOKENS
    assert info.count_prompt_tokens("a") == 3  # with both ends


@pytest.mark.parametrize(
    ("class_name", "words"),
    [
        ("NoSuchPipeline", "neither we nor diffusers"),
        ("__import__", "neither we nor diffusers"),
        ("UNet2DConditionModel", "neither we nor diffusers"),
        (["my_pipeline", "MyPipeline"], "neither we nor diffusers .* never run, also not with --trust-remote-code"),
        ("DDPMPipeline", "has no prompt"),
        ("DiffusionPipeline", "has no prompt"),
        ("WanAnimatePipeline", "it takes pose_video"),
        ("SanaVideoPipeline", "it takes frames"),
        ("FluxFillPipeline", "it takes mask_image"),
        ("QwenImageLayeredPipeline", "it makes several layers a picture"),
        ("FluxControlPipeline", "it takes control_image"),
        ("KandinskyV22Img2ImgPipeline", "has no prompt"),
        ("LTX2Pipeline", "it has audio_vae, vocoder"),
        ("StableVideoDiffusionPipeline", "its call has no prompt"),
        ("AllegroPipeline", "has no default num_frames"),
    ],
)
def test_a_pipeline_that_cannot_be_served_is_named(
    copy_of: Callable[..., Path], class_name: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_model_info(str(copy_of("FluxPipeline", _class_name=class_name)))


@pytest.mark.parametrize(
    "component",
    [
        ["os", "system"],
        ["my_scheduler", "MyScheduler"],
        ["diffusers", "nothing"],
        ["diffusers", "AutoModel"],
        ["diffusers", "StableDiffusionPipeline"],
        ["qwenimage", "modeling_qwenimage"],
        ["transformers", "AutoModel"],
        ["transformers", "Pipeline"],
    ],
)
def test_components_of_other_libraries_are_refused(copy_of: Callable[..., Path], component: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"of diffusers and transformers are loaded; code .* never run"):
        load_model_info(str(copy_of("FluxPipeline", scheduler=component)))


def test_a_class_of_a_pipelines_own_module_is_taken(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("FluxPipeline", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert load_model_info(str(folder)).served_by == "diffusers"


def test_pickled_weights_are_not_read(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("StableDiffusionXLPipeline")
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    config = OmniDiffusionConfig(model=str(folder))
    with pytest.raises(ConfigError, match=r"^unet/ has no \.safetensors file, but diffusion_pytorch_model\.bin"):
        ModelRunner(config, load_model_info(str(folder))).start()


@pytest.mark.parametrize(
    ("degrees", "flag"),
    [
        ({"ulysses_degree": 2}, "--usp"),
        ({"ring_degree": 2}, "--ring"),
        ({"cfg_parallel_size": 2}, "--cfg-parallel-size"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
    ],
)
def test_only_data_parallelism_is_taken(model_of: ModelOf, degrees: dict[str, int], flag: str) -> None:
    info = load_model_info(str(model_of("FluxPipeline")))
    info.check_parallel(DiffusionParallelConfig(data_parallel_size=2))
    with pytest.raises(ConfigError, match=f"{flag} takes 1 with a FluxPipeline"):
        info.check_parallel(DiffusionParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache_backend": "tea_cache"}, "--cache-backend tea_cache needs packed steps"),
        ({"load_format": "dummy"}, "--load-format takes auto with a FluxPipeline"),
        ({"max_batch_tokens": 100}, "--max-batch-tokens 100 needs packed steps"),
        ({"attention_backend": "sdpa"}, "--attention-backend sdpa: a .* runs diffusers' own attention"),
        ({"quantization": "fp8"}, "--quantization fp8 needs packed steps"),
        ({"text_encoder_quantization": "int8"}, "--text-encoder-quantization int8 needs packed steps"),
        ({"transformer_file": "x.gguf"}, "--transformer-file .*x.gguf: a FluxPipeline is loaded by diffusers"),
        ({"overlap_decode": True}, "--overlap-decode needs packed steps"),
        ({"enable_cpu_offload": True, "enable_layerwise_offload": True}, "got both"),
    ],
)
def test_settings_of_packed_steps_are_refused(model_of: ModelOf, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AsyncOmni(model=str(model_of("FluxPipeline")), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["enable_cpu_offload", "enable_layerwise_offload"])
def test_offload_needs_a_gpu(model_of: ModelOf, name: str) -> None:
    config = OmniDiffusionConfig(model=str(model_of("FluxPipeline")), **{name: True})  # type: ignore[arg-type]
    info = load_model_info(config.model)
    info.check_settings(config)
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} needs a GPU"):
        ModelRunner(config, info).start()


def test_frames_a_second_are_a_whole_number(copy_of: Callable[..., Path]) -> None:
    info = load_model_info(str(copy_of("FluxPipeline", _class_name="LTXI2VLongMultiPromptPipeline")))
    fps = info.default_sampling_params["fps"]
    assert (fps, type(fps)) == (25, int)
    assert isinstance(info, WholeModelInfo)
    assert info.pipeline.fps_name == "frame_rate"


@pytest.mark.parametrize(
    ("class_name", "transformer", "index", "latent_side", "size"),
    [
        ("CogVideoXPipeline", {"sample_height": 60, "sample_width": 90, "sample_frames": 49}, {}, 8, (480, 720, 49)),
        ("AllegroPipeline", {"sample_height": 90, "sample_width": 160, "sample_frames": 22}, {}, 8, (720, 1280, 88)),
        ("HunyuanVideo15Pipeline", {"target_size": 960}, {}, 16, (720, 1280, None)),
        ("HunyuanVideo15Pipeline", {"target_size": 100}, {}, 16, (1024, 1024, None)),
        ("PRXPipeline", {}, {"default_sample_size": 512}, 8, (512, 512, None)),
        ("SanaPipeline", {"sample_size": 32}, {}, 32, (1024, 1024, None)),
        ("FluxPipeline", {}, {}, 8, (1024, 1024, None)),
    ],
)
def test_the_own_size_of_published_models(
    class_name: str, transformer: dict[str, Any], index: dict[str, Any], latent_side: int, size: tuple[Any, ...]
) -> None:
    configs = {"transformer": transformer, "vae": {"temporal_compression_ratio": 4}}
    assert own_size(class_name, index, configs, latent_side) == size


@pytest.mark.parametrize(
    ("vae", "num_frames", "side", "frames"),
    [
        ({"block_out_channels": [128, 256, 512, 512]}, 1, 8, 1),
        ({"temperal_downsample": [False, True, True]}, 81, 8, 4),  # Wan 2.1
        (
            {"temperal_downsample": [False, True, True], "scale_factor_spatial": 16, "scale_factor_temporal": 4},
            121,
            16,
            4,
        ),
        (
            {
                "block_out_channels": [128, 256, 512, 512],
                "spatio_temporal_scaling": [True, True, True, False],
                "patch_size": 4,
                "patch_size_t": 1,
                "spatial_compression_ratio": None,
            },
            161,
            32,
            8,
        ),  # LTX
        ({"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}, 49, 8, 4),  # CogVideoX
        ({"encoder_block_out_channels": [64, 128, 256, 384], "temporal_expansions": [1, 2, 3]}, 19, 8, 6),  # Mochi
        ({"block_out_channels": [128, 256, 512, 512], "temporal_compression_ratio": 4}, 88, 8, 1),  # Allegro
    ],
)
def test_what_a_latent_pixel_stands_for(vae: dict[str, Any], num_frames: int, side: int, frames: int) -> None:
    assert (latent_side(vae), frame_multiple(vae, num_frames)) == (side, frames)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (np.zeros((64, 48, 3), np.uint8), "InvalidRequestError: the pipeline makes 48x64 of size 64x64"),
        (NameError("name 'ftfy' is not defined"), "NameError: name 'ftfy' is not defined"),
    ],
)
def test_a_pipeline_that_fails_on_a_trial_ends_the_start(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch, made: Any, words: str
) -> None:
    config = OmniDiffusionConfig(model=str(model_of("FluxKontextPipeline")))
    failing = {"side_effect": made}
    if not isinstance(made, Exception):
        failing = {"return_value": Picture(torch.from_numpy(made), torch.tensor(True))}
    monkeypatch.setattr(PipelineCall, "picture", Mock(**failing))
    with pytest.raises(ConfigError, match=f"FluxKontextPipeline fails on a default request: {words}"):
        ModelRunner(config, load_model_info(config.model)).start()


def test_a_trial_that_fails_when_small_is_made_at_the_models_own_size(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines that round sizes fail when small. Guidance is on: a model without it must not become ready."""
    folder = model_of("StableDiffusion3Pipeline")
    info = load_model_info(str(folder))
    info = replace(info, default_sampling_params={**info.default_sampling_params, "height": 192, "width": 256})
    real, asked = DiffusersPipeline.decode, []

    def decode(pipeline: DiffusersPipeline, requests: Sequence[DiffusionRequest], latents: Any) -> list[Picture]:
        (request,) = requests
        asked.append((request.height, request.width, request.guidance_scale))
        if (request.height, request.width) != (192, 256):
            raise ValueError("makes other sizes alone")
        return real(pipeline, requests, latents)

    monkeypatch.setattr(DiffusersPipeline, "decode", decode)
    ready = ModelRunner(OmniDiffusionConfig(model=str(folder)), info).start()
    assert asked[:3] == [(128, 128, 7.0), (192, 256, 7.0), (192, 256, 7.0)]
    assert set(asked[3:]) <= {(192, 256, 7.0)}  # more where the threads are chosen
    assert ready.seconds_per_unit > 0


def test_tiling_is_switched_on(model_of: ModelOf) -> None:
    config = OmniDiffusionConfig(model=str(model_of("FluxPipeline")), vae_use_tiling=True, vae_use_slicing=True)
    runner = ModelRunner(config, load_model_info(config.model))
    runner.start()
    vae = runner.pipeline.pipeline.vae  # type: ignore[attr-defined]
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
