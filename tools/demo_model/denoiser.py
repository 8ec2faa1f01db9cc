"""Training the text encoder and the diffusion transformer together, by flow matching on random scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import nn

from . import scenes
from .autoencoder import encode
from .network import LATENT_CHANNELS, prompt_templates
from .progress import Progress, cosine_after

DENOISER_STREAM = 3
AVERAGING = 0.9995


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Two by two latents to one token, in the order that diffusers' pipeline uses."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


class CaptionEncoder(nn.Module):
    """The language model behind the template, as diffusers' pipeline uses it."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.language_model = text_encoder.model.language_model
        self.drop = prompt_templates()[0][1]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        kept = mask[:, self.drop :]
        return states[:, self.drop :] * kept[..., None], kept


def caption_tokens(tokenizer: Any) -> Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]:
    """A function from captions to padded token ids and their mask, for the loader's workers."""
    template = prompt_templates()[0][0]

    def tokens(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [template.format(text) for text in captions]
        found = tokenizer(texts, padding=True, pad_to_multiple_of=8, return_tensors="pt")
        return found.input_ids, found.attention_mask

    return tokens


class Average:
    """An exponential moving average of parameters, with a state like a module's."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        keep = min(AVERAGING, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the parameters for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)
            yield
            torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.values, [v.to(self.values[0].device) for v in state["values"]])


class FlowMatching(nn.Module):
    """Loss of a batch of pictures with captions: the velocity from picture to noise at a random time."""

    def __init__(
        self,
        vae: AutoencoderKLQwenImage,
        caption_encoder: CaptionEncoder,
        transformer: QwenImageTransformer2DModel,
        draws: int,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.caption_encoder, self.transformer = caption_encoder, transformer
        self._vae = [vae]  # in a list: not trained, not part of this module
        device = next(vae.parameters()).device
        shape = (1, LATENT_CHANNELS, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
        self.deviation = torch.tensor(vae.config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        return pack((encode(self._vae[0], pictures)[0] - self.mean) / self.deviation)

    def forward(
        self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        target, device = self.latents(pictures).repeat(self.draws, 1, 1), pictures.device
        noise = torch.randn(target.shape, generator=generator, device=device)
        time = torch.sigmoid(torch.randn(len(target), generator=generator, device=device) * 1.1 + 0.4)
        mixed = target + time[:, None, None] * (noise - target)
        states, kept = (x.repeat(self.draws, *[1] * (x.dim() - 1)) for x in self.caption_encoder(ids, mask))
        shape = (1, pictures.shape[2] // 16, pictures.shape[3] // 16)
        velocity = self.transformer(
            hidden_states=mixed,
            timestep=time,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=kept,
            img_shapes=[[shape]] * len(target),
            return_dict=False,
        )[0]
        loss: torch.Tensor = (velocity.float() - (noise - target)).square().mean()
        return loss


def train(
    model: FlowMatching,
    tokens: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]],
    sprites: scenes.Sprites,
    progress: Progress,
    *,
    seed: int,
    steps: int,
    stop_at: int,
    batch: int,
    rate: float,
    workers: int,
    world: dict[str, Any],
    export_every: int,
    export: Callable[[], None],
) -> None:
    """Trains in place up to `steps`, continuing from the checkpoint that `progress` holds. Calls `export` with the
    average of the weights in place, from time to time and at the end; with `stop_at` it leaves earlier,
    to be continued."""
    device = sprites.full.device
    model.train()
    parameters: list[torch.Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = Average(parameters)
    state = {"model": model, "optimizer": optimizer, "average": average}
    first = progress.resume("denoiser", state)
    plans = scenes.Plans(seed + DENOISER_STREAM, batch, range(first, min(stop_at, steps)), encode=tokens, **world)
    for step, plan, (ids, mask) in scenes.loader(plans, workers):
        for group in optimizer.param_groups:
            group["lr"] = cosine_after(rate, step, steps, warm_up=200, start=0.4)
        generator = scenes.seeded(device, seed, DENOISER_STREAM, step)
        pictures = scenes.draw(plan, sprites, generator)
        ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pictures, ids, mask, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        progress.step("denoiser", step + 1, steps, state, loss=loss)
        if (step + 1) % export_every == 0 and step + 1 < steps:
            with average.in_place():
                export()
    if stop_at < steps:
        progress.save("denoiser", stop_at, state)
        return
    with average.in_place():
        export()
