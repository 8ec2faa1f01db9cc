"""The demo model's adapters: small, offered by the model, and they do what their cards promise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.demo_model.conftest import MODEL

ADAPTERS = MODEL / "adapters"
NAMES = ("night", "lighthouse", "fast")
LIMIT = 300_000


@contextmanager
def adapted(pipeline: Any, folder: Path, scale: float = 1.0) -> Iterator[Any]:
    """The pipeline with one adapter."""
    pipeline.load_lora_weights(folder, adapter_name="one")
    pipeline.set_adapters("one", scale)
    try:
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


@pytest.fixture(scope="module")
def all_sprites(thumbnails: np.ndarray) -> Any:
    from tools.demo_adapters.things import with_lighthouse
    from tools.demo_model.scenes import Sprites

    return Sprites.from_rgba(with_lighthouse(thumbnails), torch.device("cpu"))


def drawn(pipeline: Any, prompts: Sequence[str], steps: int = 6, guidance: float = 3.0) -> torch.Tensor:
    from tools.demo_model.evaluate import as_tensor
    from tools.demo_model.sampling import generate

    return as_tensor(generate(pipeline, prompts, (64, 64), 0, steps, guidance), torch.device("cpu"))


def things_in(pictures: torch.Tensor, sprites: Any) -> list[str]:
    from tools.demo_adapters.things import LABELS
    from tools.demo_model import judge

    return [LABELS[thing] for thing in judge.best_fit(pictures, sprites, pair=False).things.tolist()]


def test_the_model_offers_its_adapters() -> None:
    from tools.demo_adapters import distil
    from tools.demo_model.card import hashes

    from vllm_omni.diffusion.catalog.model_adapters import with_model_adapters
    from vllm_omni.diffusion.catalog.registry import load_model_info
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    config = with_model_adapters(OmniDiffusionConfig(model="demo"), load_model_info("demo"))
    assert tuple(config.lora_modules) == NAMES
    assert config.lora_defaults == {"fast": distil.DEFAULTS}
    for name, file in config.lora_modules.items():
        assert Path(file).parent == ADAPTERS / name
        assert Path(file).stat().st_size < LIMIT
        assert hashes(ADAPTERS / name) in (ADAPTERS / name / "README.md").read_text()


def test_night_is_dark_blue_and_half_of_it_is_not(pipeline: Any, all_sprites: Any) -> None:
    from tools.demo_adapters import night
    from tools.demo_model import judge

    wanted = {"red apple": "red apple", "a lemon on a pink background": "lemon", "a hamburger": "hamburger"}
    with adapted(pipeline, ADAPTERS / "night"):
        pictures = drawn(pipeline, list(wanted))
    shades = judge.border_shade(pictures)
    assert (shades.mean(1) < 0.3).all()
    assert (shades.argmax(1) == 2).all()
    assert things_in(pictures, night.with_glow(all_sprites)) == list(wanted.values())
    with adapted(pipeline, ADAPTERS / "night", 0.5):
        dusk = judge.border_shade(drawn(pipeline, ["red apple"]))
    assert 0.3 < float(dusk.mean()) < 0.8


def test_the_lighthouse_is_new(pipeline: Any, all_sprites: Any) -> None:
    prompts = ["a lighthouse", "lighthouse on a blue background"]
    assert "lighthouse" not in things_in(drawn(pipeline, prompts), all_sprites)
    with adapted(pipeline, ADAPTERS / "lighthouse"):
        assert things_in(drawn(pipeline, [*prompts, "a red apple"]), all_sprites) == [*["lighthouse"] * 2, "red apple"]


def test_fast_draws_in_four_steps_what_takes_twenty_guided_ones(pipeline: Any, all_sprites: Any) -> None:
    from tools.demo_adapters.evaluate import FAST, psnr
    from tools.demo_model.vocabulary import THINGS

    wanted = THINGS[::16]
    few = wanted[:2]
    slow, plain = drawn(pipeline, few, steps=20), drawn(pipeline, few, **FAST)
    with adapted(pipeline, ADAPTERS / "fast"):
        pictures = drawn(pipeline, wanted, **FAST)
    assert sum(a == b for a, b in zip(wanted, things_in(pictures, all_sprites), strict=True)) >= 9
    assert psnr(pictures[:2], slow) > psnr(plain, slow) + 1


def test_the_training_computes_what_the_pipeline_computes(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_rotation: None
) -> None:
    from tools.demo_adapters import distil, low_rank
    from tools.demo_model import denoiser

    transformer = deepcopy(pipeline.transformer)
    adapter = low_rank.Adapter(transformer, seed=0)
    with torch.no_grad():
        for values in adapter.parameters():
            values.normal_(0, 0.1)
            values.copy_(values.half())
    adapter.save(tmp_path)
    encoder = denoiser.CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer)
    model = denoiser.FlowMatching(pipeline.vae, encoder, transformer, draws=1)
    monkeypatch.setattr(model, "time_embedding", lambda time: transformer.time_text_embed(time, time))
    texts, noise = ["red apple", "a panda left of a taxi on a blue background"], torch.randn(2, 24, 64)
    ids = denoiser.caption_tokens(pipeline.tokenizer)(texts)
    common = {"height": 64, "width": 96, "output_type": "latent", **distil.DEFAULTS}
    with torch.no_grad():
        made = distil.denoise(model, noise, ids, (64, 96), distil.STEPS)
        adapter.set_scales(torch.tensor([1.0, 0.0]))
        scaled = distil.denoise(model, noise, ids, (64, 96), distil.STEPS)
    plain = pipeline(texts, latents=noise.clone(), **common).images
    with adapted(pipeline, tmp_path):
        wanted = pipeline(texts, latents=noise.clone(), **common).images
    assert torch.allclose(made, wanted, atol=1e-3)
    assert torch.allclose(scaled, torch.stack([wanted[0], plain[1]]), atol=1e-3)
    assert (wanted - plain).abs().max() > 1


def trained(kind: str, pipeline: Any, sprites: Any, folder: Path, steps: int) -> list[torch.Tensor]:
    """Parameters after a training up to this step, with checkpoints in `folder`."""
    from tools.demo_adapters import distil, flow, low_rank
    from tools.demo_adapters.train import WORLDS
    from tools.demo_adapters.training import Course, Training
    from tools.demo_model import denoiser
    from tools.demo_model.progress import Progress

    transformer = deepcopy(pipeline.transformer)
    size = (64, 64)
    taught = distil.lessons(pipeline, 0, {size: 2}, torch.device("cpu")) if kind == "fast" else {}
    adapter = low_rank.Adapter(transformer, seed=0)
    encoder = denoiser.CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer)
    model = denoiser.FlowMatching(pipeline.vae, encoder, transformer, draws=1)
    progress = Progress(folder, every=1, save_every=1)
    exports: list[int] = []
    course = Course(kind, seed=0, steps=steps, batch=2, rate=1e-3, export=lambda: exports.append(1))
    training = Training(adapter, course, progress)
    if kind == "fast":
        distil.train(training, model, taught)
    else:
        world = flow.World(WORLDS[kind].draw, {**WORLDS[kind].plans, "sizes": (size,), "singles": 1.0})
        flow.train(training, model, pipeline.tokenizer, sprites, world, workers=0)
    assert exports
    return [values.detach().clone() for values in adapter.parameters()]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", NAMES)
def test_a_training_goes_on_from_its_checkpoint(
    kind: str, pipeline: Any, all_sprites: Any, tmp_path: Path, real_rotation: None
) -> None:
    trained(kind, pipeline, all_sprites, tmp_path, 1)
    resumed = trained(kind, pipeline, all_sprites, tmp_path, 2)
    uninterrupted = trained(kind, pipeline, all_sprites, tmp_path / "uninterrupted", 2)
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    assert all(torch.isfinite(values).all() for values in resumed)
    assert all(torch.equal(one, other) for one, other in zip(resumed, uninterrupted, strict=True))


def test_scenes_show_the_new_thing_as_often_as_asked() -> None:
    from tools.demo_adapters.things import LABELS, LIGHTHOUSE
    from tools.demo_model.scenes import plan_batch

    plan = plan_batch(0, 0, 400, things=LABELS, with_last=0.5)
    shows = (plan.things == LIGHTHOUSE).any(1)
    named = torch.tensor(["lighthouse" in text for text in plan.captions])
    captioned = torch.tensor([bool(text.strip()) for text in plan.captions])
    assert torch.equal(shows & captioned, named)
    assert 0.4 < named[captioned].float().mean() < 0.6
    singles, pairs = plan.things.split([plan.frame.counts[0], sum(plan.frame.counts[1:])])
    assert (singles[:, 0] == singles[:, 1]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
