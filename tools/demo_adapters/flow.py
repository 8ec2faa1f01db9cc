"""Training an adapter by flow matching on random scenes, as the demo model was trained, at random scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..demo_model import scenes
from ..demo_model.denoiser import FlowMatching, caption_tokens
from ..demo_model.descent import Average, Descent
from ..demo_model.network import LATENT_CHANNELS
from ..demo_model.progress import Progress, cosine_after
from ..demo_model.replay import Replay
from .low_rank import Adapter

AVERAGING = 0.998
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
    adapter: Adapter,
    model: FlowMatching,
    tokenizer: Any,
    sprites: scenes.Sprites,
    world: World,
    progress: Progress,
    *,
    stage: str,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    workers: int,
    export: Callable[[], None],
) -> None:
    """Train in place up to `steps`, from the checkpoint in `progress` if there is one. Calls `export` with the average
    of the weights in place, after each checkpoint and at the end."""
    device = sprites.full.device
    parameters: list[torch.Tensor] = list(adapter.parameters())
    descent = Descent(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average(parameters, AVERAGING)

    def one_step(frame: scenes.Frame, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        *plan, ids, normal, uniform = inputs
        scales = scales_of(uniform)
        adapter.set_scales(scales.repeat(model.draws))
        pictures = world.draw(frame, plan, sprites, scales)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pictures, ids, normal)
        descent.step(loss)
        average.update()
        return {"loss": loss.detach()}

    replay = Replay(one_step, device)
    state = {"adapter": adapter, "optimizer": descent, "average": average}
    first = progress.resume(stage, state)
    plans = scenes.Plans(
        seed + FLOW_STREAM, batch, range(first, steps), encode=caption_tokens(tokenizer), **world.plans
    )
    for step, plan, ids in scenes.loader(plans, workers):
        descent.rate.fill_(cosine_after(rate, step, steps, warm_up=50, start=0.4))
        average.set_step(step)
        height, width = plan.frame.size
        generator = scenes.seeded(device, seed, FLOW_STREAM, step)
        count = batch * model.draws * (1 + height * width * LATENT_CHANNELS // 64)
        normal = torch.randn(count, generator=generator, device=device)
        uniform = torch.rand(batch, generator=generator, device=device)
        inputs = [*plan.tensors, ids, normal, uniform]
        progress.step(stage, step + 1, steps, state, **replay(plan.frame, inputs))
        if progress.is_saved(step + 1, steps):
            with average.in_place():
                export()
