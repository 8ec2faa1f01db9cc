"""Latents and captions of many random clips, made once, from which the denoiser's training draws."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from ..demo_model.network import LATENT_CHANNELS
from ..demo_model.scenes import Sprites
from .autoencoder import encode, on_device
from .clips import plan_clips
from .network import CAPTION_TOKENS, LATENT_SHAPE

LATENT_STREAM = 13
TELL_EVERY = 5.0  # seconds


class LatentBank:
    """Normalised latents of clips, [n, 16, frames, height, width], and their captions' token ids, [n, tokens]."""

    def __init__(self, latents: torch.Tensor, ids: torch.Tensor) -> None:
        self.latents, self.ids = latents, ids

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents[chosen].float(), self.ids[chosen].long()


def caption_ids(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids as the pipeline makes them, padded to CAPTION_TOKENS."""
    padded = tokenizer(captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    ids: torch.Tensor = padded.input_ids
    if ids.shape[1] != CAPTION_TOKENS:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, at most {CAPTION_TOKENS} are accepted")
    return ids


def latent_scale(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, to broadcast over them."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(value, device=device).view(1, LATENT_CHANNELS, 1, 1, 1) for value in values)
    return mean, deviation


@torch.no_grad()
def fill_bank(
    vae: AutoencoderKLWan, tokenizer: Any, sprites: Sprites, *, seed: int, count: int, batch: int
) -> LatentBank:
    """Encode `count` clips. They follow from the seed alone."""
    device = sprites.full.device
    mean, deviation = latent_scale(vae, device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    latents = torch.empty(count, *LATENT_SHAPE, dtype=half, device=device)
    ids = torch.empty(count, CAPTION_TOKENS, dtype=torch.int16, device=device)
    told = started = time.monotonic()
    for step, start in enumerate(range(0, count, batch)):
        end = min(start + batch, count)
        plan = plan_clips(seed + LATENT_STREAM, step, batch)
        captions = plan.captions(np.random.default_rng((seed, LATENT_STREAM, step)))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoded, _ = encode(vae, on_device(plan, sprites))
        # Clips of two things come last in a plan; a last part of a plan has them, too.
        kept = torch.randperm(batch, generator=torch.Generator().manual_seed(step))[: end - start]
        latents[start:end] = ((encoded - mean) / deviation)[kept.to(device)].to(half)
        ids[start:end] = caption_ids(tokenizer, [captions[i] for i in kept.tolist()]).short()
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            print(f"latents: {end} of {count} clips, {told - started:.0f} s", flush=True)
    return LatentBank(latents, ids)
