"""Training the text encoder and the diffusion transformer together, by flow matching on latents of clips."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from ..demo_model.descent import Average, Descent
from ..demo_model.progress import Progress
from ..demo_model.replay import Replay
from ..demo_model.scenes import seeded
from .latents import LatentBank
from .network import LATENT_SHAPE
from .pacing import Pace

DENOISER_STREAM = 14
AVERAGING = 0.9995
EMPTY_CAPTIONS = 0.1  # part of the captions that are left out, for guidance
TRAIN_STEPS = 1000  # timesteps of the scheduler: a time of 1 is this timestep
TIME_SPREAD, TIME_MIDDLE = 1.1, 0.7  # logit of the times; the scheduler's shift asks for late ones
WARM_UP, HELD = 200, 0.4


class TextStates(nn.Module):
    """The text encoder with padding set to zero, as diffusers' WanPipeline uses it, without values read on the host."""

    def __init__(self, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = text_encoder.encoder
        self.padding = int(text_encoder.config.pad_token_id)
        self.encoder.config._attn_implementation = "eager"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """States of captions padded on the right, [n, tokens, width], from ids [n, tokens]."""
        kept = ids != self.padding
        states = self.encoder.embed_tokens(ids)
        ignored = torch.zeros_like(kept, dtype=states.dtype).masked_fill(~kept, torch.finfo(torch.bfloat16).min)
        for block in self.encoder.block:
            states = block(states, attention_mask=ignored[:, None, None])
        states = self.encoder.final_layer_norm(states)
        masked: torch.Tensor = states * kept[..., None]
        return masked


def patches(latents: torch.Tensor) -> torch.Tensor:
    """Tokens of 2x2 latents, [n, frames * height / 2 * width / 2, 4 * channels]: place by place, channels inside."""
    count, channels, frames, height, width = latents.shape
    parts = latents.view(count, channels, frames, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 3, 5, 4, 6, 1).reshape(count, -1, 4 * channels)


class VideoFlowMatching(nn.Module):
    """Loss of a batch of latents with captions: the velocity from clip to noise at a random time."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_states, self.transformer = TextStates(text_encoder), transformer

    def velocity(self, mixed: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Patches of the velocity at noised latents. The same as the transformer's own forward, with a product instead
        of the 3D convolution and with the embedding of time in float32 also under autocast."""
        transformer, embedder = self.transformer, self.transformer.condition_embedder
        convolution = transformer.patch_embedding
        weight = convolution.weight[:, :, 0].permute(0, 2, 3, 1).flatten(1)
        # clones: the compiler treats a view differently and would compile the block again
        hidden = F.linear(patches(mixed), weight, convolution.bias).clone()
        with torch.autocast(mixed.device.type, enabled=False):
            embedded = embedder.time_embedder(embedder.timesteps_proj(timesteps))
        modulation = embedder.time_proj(embedder.act_fn(embedded)).unflatten(1, (6, -1))
        text = embedder.text_embedder(self.text_states(ids)).clone()
        rotary = transformer.rope(mixed)
        for block in transformer.blocks:
            hidden = block(hidden, text, modulation, rotary)
        shift, scale = (transformer.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        hidden = transformer.norm_out(hidden.float()) * (1 + scale) + shift
        velocity: torch.Tensor = transformer.proj_out(hidden)
        return velocity

    def forward(
        self, latents: torch.Tensor, ids: torch.Tensor, times: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Loss of a batch; `times` are normal numbers, [n], and `noise` has the latents' shape."""
        time = torch.sigmoid(times * TIME_SPREAD + TIME_MIDDLE)
        mixed = latents + time.view(-1, 1, 1, 1, 1) * (noise - latents)
        timesteps = time * TRAIN_STEPS
        # UniPC gives whole timesteps, cut off; Euler gives exact ones.
        whole, exact = timesteps.tensor_split(2)
        velocity = self.velocity(mixed, torch.cat([whole.floor(), exact]), ids)
        return (velocity.float() - patches(noise - latents)).square().mean()


def train(
    model: VideoFlowMatching,
    bank: LatentBank,
    empty: torch.Tensor,
    progress: Progress,
    pace: Pace,
    *,
    seed: int,
    batch: int,
    rate: float,
    export_every: int,
    export: Callable[[], None],
) -> None:
    """Train in place for the steps of `pace`, from the checkpoint in `progress` if there is one.

    Calls `export` with the average of the weights in place, from time to time and at the end. `empty`: token ids of no
    caption, [tokens].
    """
    device = bank.latents.device
    model.train()
    parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    descent = Descent(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(parameters, AVERAGING)

    def one_step(count: int, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        chosen, left_out, times, noise = inputs
        latents, ids = bank.rows(chosen)
        ids = torch.where(left_out[:, None] < EMPTY_CAPTIONS, empty, ids)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(latents, ids, times, noise)
        descent.step(loss)
        average.update()
        return {"loss": loss.detach()}

    replay = Replay(one_step, device)
    state = {"model": model, "optimizer": descent, "average": average, "pace": pace}
    for step in pace.steps_from(progress.resume("denoiser", state)):
        descent.rate.fill_(pace.cosine(rate, step, WARM_UP, HELD))
        average.set_step(step)
        generator = seeded(device, seed, DENOISER_STREAM, step)
        chosen = torch.randint(len(bank), (batch,), generator=generator, device=device)
        left_out = torch.rand(batch, generator=generator, device=device)
        times = torch.randn(batch, generator=generator, device=device)
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator, device=device)
        values = replay(batch, [chosen, left_out, times, noise])
        progress.step("denoiser", step + 1, pace.count, state, **values)
        if (step + 1) % export_every == 0 and step + 1 < pace.count:
            with average.in_place():
                export()
    with average.in_place():
        export()
