"""Training code of the video model: it computes what diffusers computes, learns, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tools.demo_model.descent import Descent
from tools.demo_model.progress import Progress
from tools.demo_model.scenes import Sprites
from tools.demo_video import autoencoder, denoiser, latents, network
from tools.demo_video.pacing import Pace
from tools.demo_video.train import arguments

CPU = torch.device("cpu")
CAPTIONS = ["A red apple moving right on a blue background.", "", "two stars crossing"]
LIMIT = 16 * 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return network.build_tokenizer()


@pytest.fixture
def vae() -> Any:
    """Autoencoder whose every weight matters."""
    torch.manual_seed(0)
    vae = network.build_autoencoder().eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_autoencoder_in_one_pass_is_that_of_diffusers(vae: Any, frames: int) -> None:
    clips = torch.randn(2, 3, frames, 8, 16)
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(vae, clips)
        wanted = vae.encode(clips).latent_dist
        decoded, wanted_clips = autoencoder.decode(vae, mean), vae.decode(mean).sample
    assert torch.allclose(mean, wanted.mean, atol=1e-4)
    assert torch.allclose(log_variance, wanted.logvar, atol=1e-4)
    assert torch.allclose(decoded.clamp(-1, 1), wanted_clips, atol=1e-4)


def test_the_autoencoder_learns_and_uses_every_weight() -> None:
    torch.manual_seed(1)
    vae = network.build_autoencoder()
    clips = torch.rand(1, 3, 1, 1, 1).expand(1, 3, 5, 8, 8) * 2 - 1
    descent = Descent(list(vae.parameters()), betas=(0.9, 0.99), weight_decay=0.0)
    descent.rate.fill_(2e-3)
    losses = []
    for _ in range(5):
        loss, _ = autoencoder.loss_of(vae, clips, torch.zeros(1, 16, 2, 1, 1))
        descent.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for name, p in vae.named_parameters() if p.grad is None]


def small_model(tokenizer: Any) -> denoiser.VideoFlowMatching:
    torch.manual_seed(2)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=network.TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return denoiser.VideoFlowMatching(network.build_text_encoder(tokenizer), transformer)


def test_the_training_computes_what_the_pipeline_computes(tokenizer: Any) -> None:
    model = small_model(tokenizer).eval()
    text_encoder = network.build_text_encoder(tokenizer).eval()
    text_encoder.encoder.load_state_dict(model.text_states.encoder.state_dict())
    pipeline = WanPipeline(
        tokenizer, text_encoder, vae=None, scheduler=network.build_scheduler(), transformer=model.transformer
    )
    noised, timesteps = torch.randn(3, 16, 2, 4, 6), torch.tensor([3.0, 500.0, 937.5])
    ids = latents.caption_ids(tokenizer, CAPTIONS)
    with torch.no_grad():
        wanted_states, _ = pipeline.encode_prompt(
            CAPTIONS,
            do_classifier_free_guidance=False,
            max_sequence_length=network.CAPTION_TOKENS,
            device=CPU,
        )
        wanted = model.transformer(noised, timesteps, wanted_states, return_dict=False)[0]
        states, velocity = model.text_states(ids), model.velocity(noised, timesteps, ids)
    assert torch.allclose(states, wanted_states, atol=1e-5)
    assert torch.allclose(velocity, denoiser.patches(wanted), atol=1e-5)


def train_denoiser(model: Any, tokenizer: Any, folder: Path, steps: int) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    bank = latents.LatentBank(
        torch.randn(6, *network.LATENT_SHAPE, generator=generator),
        latents.caption_ids(tokenizer, CAPTIONS * 2).short(),
    )
    exported: list[str] = []
    denoiser.train(
        model,
        bank,
        latents.caption_ids(tokenizer, [""])[0],
        Progress(folder, every=100, save_every=2),
        Pace(steps, 1, CPU),
        seed=0,
        batch=4,
        rate=1e-3,
        export_every=3,
        export=lambda: exported.append("sheet"),
    )
    return exported


def test_a_resumed_training_is_the_unbroken_one(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "HELD", 1 - 1e-9)  # the rate of a step does not depend on the number of steps
    unbroken, broken = small_model(tokenizer), small_model(tokenizer)
    start = broken.transformer.proj_out.weight.detach().clone()
    assert train_denoiser(unbroken, tokenizer, tmp_path / "unbroken", steps=4) == ["sheet", "sheet"]
    train_denoiser(broken, tokenizer, tmp_path / "broken", steps=2)
    resumed = small_model(tokenizer)
    assert train_denoiser(resumed, tokenizer, tmp_path / "broken", steps=4) == ["sheet", "sheet"]
    for wanted, found in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(wanted, found)
    assert not torch.equal(start, resumed.transformer.proj_out.weight)


def test_a_bank_has_normal_latents_and_captions(tokenizer: Any, vae: Any, thumbnails: Sprites) -> None:
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    made = [latents.fill_bank(vae, tokenizer, thumbnails, seed=0, count=3, batch=2) for _ in range(2)]
    assert torch.equal(made[0].latents, made[1].latents)
    assert torch.equal(made[0].ids, made[1].ids)
    found, ids = made[0].rows(torch.tensor([2, 0]))
    assert found.shape == (2, *network.LATENT_SHAPE)
    assert ids.shape == (2, network.CAPTION_TOKENS)
    assert (ids == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]


def test_the_steps_fill_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    pace = Pace(None, 1, CPU)
    done = 0
    for step in pace.steps_from(0):
        assert step == done
        clock[0] += 10 if step == 0 else 0.05  # the first one compiles
        done += 1
    assert clock[0] == pytest.approx(60, abs=0.1)
    assert done == pace.count == pytest.approx(1 + (60 - 10) / 0.05, abs=1)
    resumed = Pace(None, 1, CPU)
    resumed.load_state_dict(pace.state_dict())
    assert list(resumed.steps_from(done - 2)) == [done - 2, done - 1]


def test_given_steps_are_done() -> None:
    pace = Pace(5, 1, CPU)
    pace.load_state_dict({"count": 9})
    assert list(pace.steps_from(3)) == [3, 4]


def test_the_model_is_small_enough_to_ship(tokenizer: Any, tmp_path: Path) -> None:
    parts = network.build_text_encoder(tokenizer), network.build_autoencoder(), network.build_transformer()
    tokenizer.save_pretrained(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) + files < LIMIT - 50_000


def test_the_default_training_is_bounded_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    args = arguments()
    assert args.steps is None
    assert args.autoencoder_steps is None
    assert args.minutes + args.autoencoder_minutes <= 8
