"""The measured changes are those of diffusers' own transformer, and the polynomial is their least-squares fit."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor, nn

from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from vllm_omni.diffusion.catalog.find_folder import EMBEDDED_MODELS
from vllm_omni.diffusion.catalog.hub import HubAccess
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.cache.calibration import Change, fit_polynomial, root_mean_square_error
from vllm_omni.entrypoints.cli import calibrate
from vllm_omni.entrypoints.cli.commands import CALIBRATE
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import ConfigError

STEPS = 6


class WatchedBlocks(nn.Module):
    """All blocks as one; notes the modulated input and the output of two guidance branches that take turns."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.inner = blocks
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first: Any = self.inner[0]
        shift, scale, _ = first.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0].chunk(3, dim=-1)
        modulated = first.img_norm1(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        for block in self.inner:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, **kwargs)
        self.seen.append((modulated, hidden_states))
        return encoder_hidden_states, hidden_states


def diffusers_changes(path: Path, prompt: str, seed: int) -> list[tuple[int, float, float]]:
    pipe = QwenImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    watched = WatchedBlocks(pipe.transformer.transformer_blocks)
    pipe.transformer.transformer_blocks = nn.ModuleList([watched])
    pipe(
        prompt,
        negative_prompt=" ",
        height=48,
        width=64,
        num_inference_steps=STEPS,
        true_cfg_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )

    def change(now: Tensor, before: Tensor) -> float:
        return ((now - before).abs().mean() / before.abs().mean()).item()

    pairs = zip(watched.seen[2:], watched.seen)
    return [(2 + i, change(a[0], b[0]), change(a[1], b[1])) for i, (a, b) in enumerate(pairs)]


def test_the_command_measures_and_fits(calm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo\n\na red apple and a blue car\n")
    words = ["--prompts", str(prompts), "--size", "64x48", "--num-inference-steps", str(STEPS)]
    words += ["--true-cfg-scale", "3", "--seed", "5", "--out", str(tmp_path / "out" / "tiny")]
    with pytest.raises(SystemExit) as ended:
        main([CALIBRATE, str(calm_model), *words])

    assert ended.value.code == 0
    report = json.loads((tmp_path / "out" / "tiny.json").read_text())
    wanted = [
        *diffusers_changes(calm_model, "a photo", 5),
        *diffusers_changes(calm_model, "a red apple and a blue car", 6),
    ]
    assert len(wanted) == 2 * 2 * (STEPS - 1)
    measured = np.array(report["changes"])
    assert measured[:, 0].tolist() == [call // 2 for call, _, _ in wanted]
    np.testing.assert_allclose(measured[:, 1:], np.array(wanted)[:, 1:], rtol=1e-3)
    np.testing.assert_allclose(report["coefficients"], np.polyfit(measured[:, 1], measured[:, 2], 4))
    assert (report["num_prompts"], report["num_inference_steps"]) == (2, STEPS)
    assert (tmp_path / "out" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert f'{{"coefficients": {json.dumps(report["coefficients"])}}}' in capsys.readouterr().out


def test_the_fit_is_exact_where_it_can_be() -> None:
    quartic = (3.0, -2.0, 1.0, 0.5, 0.1)
    changes = [Change(1, x, float(np.polyval(quartic, x))) for x in np.linspace(0, 1, 20)]
    np.testing.assert_allclose(fit_polynomial(changes), quartic, atol=1e-9)
    assert root_mean_square_error(quartic, changes) == 0
    assert root_mean_square_error((0.0,), [Change(1, 0.0, 3.0), Change(2, 1.0, 4.0)]) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--size", "64"], "--size takes WIDTHxHEIGHT in pixels, got '64'"),
        (["demo", "--num-frames", "0"], "--num-frames takes an integer of at least 1, got '0'"),
        (["demo", "--num-inference-steps", "2"], "--num-inference-steps takes an integer of at least 3, got '2'"),
        (["demo", "--prompts", "/nowhere/prompts"], "--prompts: cannot read /nowhere/prompts"),
        (["demo", "--magic"], "unrecognized arguments: --magic"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_wrong_flags_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate.parse_args(words)


def test_the_help_names_the_embedded_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calibrate.parse_args(["--help"])
    text = capsys.readouterr().out
    assert [name for name in EMBEDDED_MODELS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_an_embedded_model_accepts_the_built_in_prompts(model: str) -> None:
    info = load_model_info(model)
    most = info.default_sampling_params.get("max_sequence_length", info.max_prompt_tokens)
    assert [p for p in calibrate.DEFAULT_PROMPTS if info.count_prompt_tokens(p) > most] == []


def test_settings_of_videos_reach_the_requests() -> None:
    args = calibrate.parse_args(["demo", "--num-frames", "9", "--size", "64x48", "--guidance-scale", "4"])
    assert (args.params.num_frames, args.params.width, args.params.height) == (9, 64, 48)
    assert (args.params.guidance_scale, args.params.true_cfg_scale) == (4, None)


def test_a_hub_model_is_named_as_in_serve() -> None:
    words = ["org/painter", "--revision", "v1", "--download-dir", "/models", "--hf-token", "hf_x", "--variant", "fp16"]
    args = calibrate.parse_args([*words, "--dtype", "half"])
    assert (HubAccess.of(args.config), args.config.dtype) == (HubAccess("v1", "/models", "hf_x", "fp16"), "float16")
    with pytest.raises(ConfigError, match=r"^--revision v1 is for hub models; 'demo' is a folder"):
        calibrate.calibrate(calibrate.parse_args(["demo", "--revision", "v1"]))


def test_what_the_model_does_not_take_ends_the_command(
    calm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([CALIBRATE, str(calm_model), "--size", "70x64", "--out", str(tmp_path / "x")])
    assert ended.value.code == 2
    assert "nearest valid size is 64x64" in capsys.readouterr().err


def test_files_are_chosen_and_checked_as_in_serve(
    calm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(calm_model, tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo\n")
    command = [CALIBRATE, str(folder), "--prompts", str(prompts), "--size", "32x32"]
    command += ["--num-inference-steps", str(STEPS), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "weight files of the variants fp16 alone: choose one with --variant" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*command, "--variant", "fp16"])
    assert ended.value.code == 0
    capsys.readouterr()
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--variant", "fp16"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: cannot read tokenizer/tokenizer.json: no valid JSON" in line


def picture(folder: Path) -> str:
    path = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_an_editing_model_is_measured_on_pictures(tmp_path: Path) -> None:
    model = build_tiny_qwen_image(
        tmp_path / "model", edit="QwenImageEditPlusPipeline", time_scale=0.3, default_sampling_params=SMALL
    )
    words = ["--images", picture(tmp_path), "--num-inference-steps", "4", "--out", str(tmp_path / "tea.v2")]
    with pytest.raises(SystemExit) as ended:
        main([CALIBRATE, str(model), *words])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "tea.v2.json").read_text())
    assert {step for step, _, _ in report["changes"]} == {1, 2, 3}
    assert (tmp_path / "tea.v2.png").is_file()
    assert not (tmp_path / "tea.json").exists()


@pytest.mark.parametrize(
    ("build", "with_picture", "message"),
    [
        (build_tiny_qwen_image, True, "--images is for models that edit pictures"),
        (
            partial(build_tiny_qwen_image, edit="QwenImageEditPlusPipeline"),
            False,
            "--images takes what the prompts edit",
        ),
        (
            partial(build_tiny_diffusers, "FluxPipeline"),
            False,
            "needs packed steps, which a FluxPipeline does not have",
        ),
    ],
)
def test_models_that_cannot_be_measured_so_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], build: Any, with_picture: bool, message: str
) -> None:
    images = ["--images", picture(tmp_path)] if with_picture else []
    with pytest.raises(SystemExit) as ended:
        main([CALIBRATE, str(build(tmp_path / "model")), *images, "--out", str(tmp_path / "x")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
