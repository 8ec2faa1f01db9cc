"""Distilling the guided model of 20 steps into an adapter for four steps without guidance.

Both go from the same noise along a schedule without randomness, so a prompt and a noise have one right picture: the
teacher's. The student's four steps are one differentiable computation, whose loss compares the last latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from ..demo_model import scenes
from ..demo_model.denoiser import FlowMatching, caption_tokens
from ..demo_model.network import LATENT_CHANNELS, SCHEDULER, build_scheduler
from ..demo_model.replay import Replay
from .training import Training

STEPS = 4
DEFAULTS = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0}
TEACHER = {"num_inference_steps": 20, "true_cfg_scale": 3.0}
TEACHER_BATCH = 1024
DISTIL_STREAM = 12

Lesson = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # token ids, noise, the teacher's latents


def sigmas(size: tuple[int, int], steps: int) -> list[float]:
    """Noise levels of the pipeline for a picture of this size, from 1 to 0, one more than steps."""
    scheduler = build_scheduler()
    tokens = size[0] * size[1] // 256
    mu = calculate_shift(
        tokens,
        SCHEDULER["base_image_seq_len"],
        SCHEDULER["max_image_seq_len"],
        SCHEDULER["base_shift"],
        SCHEDULER["max_shift"],
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels: list[float] = scheduler.sigmas.tolist()
    return levels


@torch.no_grad()
def lessons(
    pipeline: Any, seed: int, counts: dict[tuple[int, int], int], device: torch.device
) -> dict[tuple[int, int], Lesson]:
    """Pictures of the teacher, as packed latents: so many prompts at each size."""
    tokens = caption_tokens(pipeline.tokenizer)
    made: dict[tuple[int, int], Lesson] = {}
    for number, (size, count) in enumerate(counts.items()):
        parts: list[Lesson] = []
        for start in range(0, count, TEACHER_BATCH):
            key = (seed, DISTIL_STREAM, number, start)
            seed_of_part = int(np.random.SeedSequence(key).generate_state(1)[0])
            plan = scenes.plan_batch(seed_of_part, 0, min(TEACHER_BATCH, 2 * (count - start)))
            texts = [text for text in plan.captions if text.strip()]
            shape = (len(texts), size[0] * size[1] // 256, 4 * LATENT_CHANNELS)
            noise = torch.randn(shape, generator=scenes.seeded(device, *key), device=device)
            latents = pipeline(
                texts,
                negative_prompt=[""] * len(texts),
                height=size[0],
                width=size[1],
                latents=noise.clone(),
                output_type="latent",
                **TEACHER,
            ).images
            parts.append((tokens(texts).to(device), noise, latents))
        ids, noises, endings = (torch.cat(tensors)[:count] for tensors in zip(*parts, strict=True))
        made[size] = (ids, noises, endings)
        print(f"lessons at {size[0]}x{size[1]}: {len(made[size][0])}", flush=True)
    return made


def denoise(
    model: FlowMatching, noise: torch.Tensor, ids: torch.Tensor, size: tuple[int, int], steps: int
) -> torch.Tensor:
    """Last latents of a run of the pipeline without guidance."""
    states, kept = model.caption_encoder(ids)
    latents, levels = noise, sigmas(size, steps)
    for level, following in itertools.pairwise(levels):
        time = torch.full((len(noise),), level, device=noise.device)
        velocity = model.velocity(latents, time, states, kept, (size[0] // 16, size[1] // 16))
        latents = latents + (following - level) * velocity.float()
    return latents


def batches(
    taught: dict[tuple[int, int], Lesson], seed: int, batch: int, steps: range
) -> Iterator[tuple[int, tuple[int, int], list[torch.Tensor]]]:
    """Step, size and lessons of each training step, which follow from the seed and the step alone."""
    sizes = list(taught)
    for step in steps:
        rng = np.random.default_rng((seed, DISTIL_STREAM, step))
        size = sizes[0] if rng.random() < 0.5 else sizes[int(rng.integers(len(sizes)))]  # the first one: NATIVE
        rows = torch.from_numpy(rng.integers(len(taught[size][0]), size=batch)).to(taught[size][1].device)
        yield step, size, [tensor[rows] for tensor in taught[size]]


def train(training: Training, model: FlowMatching, taught: dict[tuple[int, int], Lesson]) -> None:
    """Train in place, from the checkpoint if there is one."""
    course, device = training.course, training.device

    def one_step(size: tuple[int, int], inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids, noise, wanted = inputs
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = denoise(model, noise, ids, size, STEPS)
        loss = F.smooth_l1_loss(made, wanted)
        training.descend(loss)
        return {"loss": loss.detach(), "square_error": (made - wanted).detach().square().mean()}

    replay = Replay(one_step, device)
    for step, size, inputs in batches(taught, course.seed, course.batch, training.resume()):
        training.begin(step)
        training.end(step, replay(size, inputs))
