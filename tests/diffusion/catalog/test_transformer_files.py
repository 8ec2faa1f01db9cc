"""Single files that are refused: by the front end from their headers, or before the worker reads a weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from testbed.runner_driver import QUICK
from testbed.single_files import folder_weights, remove_weights, save, with_own_names, with_prefix
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_z_image import build_tiny_z_image
from tests.broken_folders import POINTER
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.omni import AsyncOmni

Weights = dict[str, Tensor]
FIRST = "layers.0.attention.to_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_z_image(tmp_path_factory.mktemp("models") / "z-image")


def refusal_by_front_end(model: Path, file: Path | str, flag: str = "transformer_file") -> str:
    with pytest.raises(ConfigError) as caught:
        AsyncOmni(model=str(model), **{flag: str(file)})  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_that_cannot_be_read_is_named(model: Path, tmp_path: Path) -> None:
    good = save(folder_weights(model), tmp_path / "good.safetensors")
    assert refusal_by_front_end(model, "gone.safetensors").startswith("--transformer-file takes a file that exists, ")
    assert "--transformer-file takes a file that exists" in refusal_by_front_end(model, tmp_path)
    other = tmp_path / "x.ckpt"
    other.write_bytes(good.read_bytes())
    assert f"--transformer-file takes a file named *.safetensors or *.gguf, got {other}" == refusal_by_front_end(
        model, other
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1])
    size = good.stat().st_size
    assert refusal_by_front_end(model, cut) == f"{cut} is truncated: it has {size - 1} bytes and needs {size}"
    cut.write_bytes(b"PK\x03\x04 a zip file")
    assert refusal_by_front_end(model, cut).startswith(f"{cut} is no safetensors file: ")
    cut.write_text(POINTER)
    assert f"cannot read {cut}: it is a Git LFS pointer" in refusal_by_front_end(model, cut)
    dangling = tmp_path / "link.safetensors"
    dangling.symlink_to(tmp_path / "nowhere")
    assert "takes a file that exists" in refusal_by_front_end(model, dangling)


def test_files_of_other_kinds_are_called_by_their_kind(model: Path, tmp_path: Path) -> None:
    takes = "--transformer-file takes a file with the weights of a transformer, got "
    adapter = save_peft(random_pairs(transformer_of(model), seed=1), tmp_path / "adapter.safetensors")
    message = refusal_by_front_end(model, adapter)
    assert message.startswith(f"{takes}{adapter}, a LoRA adapter (it has ")
    assert message.endswith(".lora_A.weight): --lora-modules takes it")
    for file, words in (
        (model / "vae" / "diffusion_pytorch_model.safetensors", "the weights of a VAE (it has decoder.conv_in.weight)"),
        (model / "text_encoder" / "model.safetensors", "the weights of a text encoder (it has embed_tokens.weight)"),
        (save({"scaled_fp8": torch.zeros(1)}, tmp_path / "marker.safetensors"), "no weights"),
        (save(with_prefix({"decoder.conv_in.weight": torch.zeros(1)}, "vae."), tmp_path / "v.safetensors"), "a VAE"),
    ):
        message = refusal_by_front_end(model, file)
        assert message.startswith(f"{takes}{file}, which holds ")
        assert words in message


def test_packed_types_and_strays_are_refused(model: Path, tmp_path: Path) -> None:
    weights = folder_weights(model)
    packed = save(weights | {FIRST: torch.zeros(48, 24, dtype=torch.uint8)}, tmp_path / "nf4.safetensors")
    assert f"{packed}: {FIRST} is stored as U8; weights are read from " in refusal_by_front_end(model, packed)
    stray = save(with_prefix(weights, "diffusion_model.") | {"head.weight": torch.zeros(1)}, tmp_path / "s.safetensors")
    assert refusal_by_front_end(model, stray) == (
        f"{stray} has a weight outside of its transformer, whose names begin with diffusion_model.: head.weight"
    )


def test_models_that_take_no_such_file_say_so(model: Path, tmp_path: Path) -> None:
    file = save(folder_weights(model), tmp_path / "x.safetensors")
    assert refusal_by_front_end(model, file, "transformer_file_2") == (
        f"--transformer-file-2 takes a model with a transformer_2, which this model does not have: got {file}"
    )
    whole = build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path / "sd3")
    assert refusal_by_front_end(whole, file) == (
        f"--transformer-file {file}: a StableDiffusion3Pipeline is loaded by diffusers, from the model folder alone"
    )
    with pytest.raises(ConfigError, match="--transformer-file x has no effect with --load-format dummy"):
        OmniDiffusionConfig(str(model), transformer_file="x", load_format="dummy")


def refusal_by_worker(model: Path, file: Path) -> str:
    """Error of a worker for a folder of which nothing can be read but configs: it comes before any weight."""
    config = OmniDiffusionConfig(model=str(model), transformer_file=str(file), progress_bar=False)
    with pytest.raises(ConfigError) as caught:
        ModelRunner(config, load_model_info(str(model)), options=QUICK).start()
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: weight for key, weight in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(FIRST), "x.safetensors lacks 1 weights of the transformer, among them layers.0.attention.to_q.weight"),
        (
            lambda weights: without("layers.1.attention.qkv.weight")(with_own_names("z_image", weights)),
            "x.safetensors lacks 3 weights of the transformer, among them layers.1.attention.to_q.weight",
        ),
        (
            lambda weights: weights | {FIRST: torch.zeros(48, 24)},
            f"x.safetensors: {FIRST} has shape (48, 24), by transformer/config.json it is (48, 48)",
        ),
        (
            lambda weights: with_own_names("z_image", weights) | {"layers.0.attention.qkv.weight": torch.zeros(96, 48)},
            f"x.safetensors: {FIRST} (layers.0.attention.qkv.weight in the file) has shape (32, 48), by ",
        ),
        (
            lambda weights: weights | {"layers.2.extra.weight": torch.zeros(1)},
            "x.safetensors has 1 weights that the transformer does not take, among them layers.2.extra.weight",
        ),
        (
            lambda weights: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)},
            "--transformer-file takes the weights of this model's transformer, such as ",
        ),
        (
            lambda weights: weights | {FIRST.replace("weight", "scale_weight"): torch.ones(1)},
            "attention.to_q.scale_weight is the scale of a float8 weight, which the file does not hold",
        ),
        (
            lambda weights: (
                weights
                | {
                    FIRST: torch.zeros(48, 48, dtype=torch.float8_e4m3fn),
                    FIRST.replace("weight", "weight_scale"): torch.ones(3, 3),
                }
            ),
            "takes one floating-point number, or one for each of the 48 rows of its weight, got F32 of shape (3, 3)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_any_weight_is_read(
    change: Callable[[Weights], Weights], words: str, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = save(change(folder_weights(folder)), tmp_path / "x.safetensors")
    for component in ("text_encoder", "vae", "transformer"):
        remove_weights(folder, component)
    assert words in refusal_by_worker(folder, file)
