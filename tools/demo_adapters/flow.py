"""Training an adapter by flow matching on random scenes, as the demo model was trained, at random scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..demo_model import scenes
from ..demo_model.denoiser import FlowMatching, caption_tokens
from ..demo_model.network import LATENT_CHANNELS
from ..demo_model.replay import Replay
from .training import Training

FULL_SCALE = 0.6  # fraction of scenes at scale 1; the others have a scale between LEAST_SCALE and 1
LEAST_SCALE = 0.3
FLOW_STREAM = 11

Draw = Callable[[scenes.Frame, "list[torch.Tensor]", scenes.Sprites, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class World:
    """Scenes that an adapter learns. `draw` gets the adapter's scale of each scene."""

    draw: Draw
    plans: dict[str, Any] = field(default_factory=dict)  # arguments of scenes.plan_batch


def draw_plain(
    frame: scenes.Frame, plan: list[torch.Tensor], sprites: scenes.Sprites, scales: torch.Tensor
) -> torch.Tensor:
    """Scenes that look the same at every scale of the adapter."""
    return scenes.draw(frame, plan, sprites)


def scales_of(numbers: torch.Tensor) -> torch.Tensor:
    """Scales of scenes from numbers in [0, 1)."""
    part = ((numbers - FULL_SCALE) / (1 - FULL_SCALE)).clamp(0, 1)
    return 1 - part * (1 - LEAST_SCALE)


def train(
    training: Training,
    model: FlowMatching,
    tokenizer: Any,
    sprites: scenes.Sprites,
    world: World,
    *,
    workers: int,
) -> None:
    """Train in place, from the checkpoint if there is one."""
    course, device, adapter = training.course, training.device, training.adapter

    def one_step(frame: scenes.Frame, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        *plan, ids, normal, uniform = inputs
        scales = scales_of(uniform)
        adapter.set_scales(scales.repeat(model.draws))
        pictures = world.draw(frame, plan, sprites, scales)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pictures, ids, normal)
        training.descend(loss)
        return {"loss": loss.detach()}

    replay = Replay(one_step, device)
    left, encode = training.resume(), caption_tokens(tokenizer)
    plans = scenes.Plans(course.seed + FLOW_STREAM, course.batch, left, encode=encode, **world.plans)
    for step, plan, ids in scenes.loader(plans, workers):
        training.begin(step)
        height, width = plan.frame.size
        generator = scenes.seeded(device, course.seed, FLOW_STREAM, step)
        count = course.batch * model.draws * (1 + height * width * LATENT_CHANNELS // 64)
        normal = torch.randn(count, generator=generator, device=device)
        uniform = torch.rand(course.batch, generator=generator, device=device)
        training.end(step, replay(plan.frame, [*plan.tensors, ids, normal, uniform]))
