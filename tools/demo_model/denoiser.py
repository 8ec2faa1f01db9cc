"""Training the text encoder and the diffusion transformer together, by flow matching on random scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import nn

from . import scenes
from .autoencoder import encode
from .descent import Average, Descent
from .network import LATENT_CHANNELS, prompt_templates
from .progress import Progress, cosine_after
from .replay import Replay

DENOISER_STREAM = 3
AVERAGING = 0.9995
CAPTION_TOKENS = 24  # room for the longest caption and the end of the template


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack two by two latents into one token, in the order of diffusers' pipeline."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def caption_tokens(tokenizer: Any) -> Callable[[list[str]], torch.Tensor]:
    """Function from captions to the token ids that the pipeline keeps, for the loader's workers."""
    end = tokenizer(prompt_templates()[0][0].split("{}")[1]).input_ids
    padding = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)

    def tokens(captions: list[str]) -> torch.Tensor:
        rows = [ids + end for ids in tokenizer(captions).input_ids]
        return torch.tensor([row + [padding] * (CAPTION_TOKENS - len(row)) for row in rows])

    return tokens


class CaptionEncoder(nn.Module):
    """Text encoder of captions in the template, used as in diffusers' pipeline."""

    front: torch.Tensor

    def __init__(self, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.language_model = text_encoder.model.language_model
        template, self.drop = prompt_templates()[0]
        self.padding = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
        front = tokenizer(template.split("{}")[0], return_tensors="pt").input_ids
        self.register_buffer("front", front.to(text_encoder.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States and mask of the tokens after the template's front. Padding is on the right and attention causal, so
        the language model needs no mask."""
        ids = torch.cat([self.front.expand(len(ids), -1), ids], 1)
        unmasked = {"full_attention": None}
        states = self.language_model(input_ids=ids, attention_mask=unmasked, use_cache=False).last_hidden_state
        kept = (ids != self.padding)[:, self.drop :]
        return states[:, self.drop :] * kept[..., None], kept


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

    def time_embedding(self, time: torch.Tensor) -> torch.Tensor:
        """Embedding of the times: exact for half of the batch, for the other half rounded as in a bfloat16 pipeline.

        So the model learns not to rely on the highest frequencies, which the rounding changes.
        """
        early, late = time.tensor_split(2)
        with torch.autocast(time.device.type, enabled=False):
            embedding: torch.Tensor = self.transformer.time_text_embed(torch.cat([early, late.bfloat16()]), time)
        return embedding

    def velocity(
        self, mixed: torch.Tensor, time: torch.Tensor, states: torch.Tensor, kept: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Run the transformer with our time embedding and only with operations that a CUDA graph can capture."""
        transformer = self.transformer
        # clones: the compiler treats a view differently and would compile the block again
        picture = transformer.img_in(mixed).clone()
        text = transformer.txt_in(transformer.txt_norm(states)).clone()
        embedded = self.time_embedding(time).to(picture.dtype)
        tables = transformer.pos_embed([(1, *grid)], max_txt_seq_len=text.shape[1], device=picture.device)
        positions = tuple(torch.view_as_real(table).clone() for table in tables)
        torch._dynamo.maybe_mark_dynamic(picture, 1)
        torch._dynamo.maybe_mark_dynamic(positions[0], 0)
        for block in transformer.transformer_blocks:
            text, picture = block(
                hidden_states=picture,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=kept,
                temb=embedded,
                image_rotary_emb=positions,
            )
        velocity: torch.Tensor = transformer.proj_out(transformer.norm_out(picture, embedded))
        return velocity

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Loss of a batch. `normal`: normal numbers for the times and the noise of every draw."""
        target = self.latents(pictures).repeat(self.draws, 1, 1)
        times, noise = normal.split([len(target), target.numel()])
        time, noise = torch.sigmoid(times * 1.1 + 0.4), noise.view_as(target)
        mixed = target + time[:, None, None] * (noise - target)
        states, kept = (x.repeat(self.draws, *[1] * (x.dim() - 1)) for x in self.caption_encoder(ids))
        velocity = self.velocity(mixed, time, states, kept, (pictures.shape[2] // 16, pictures.shape[3] // 16))
        loss: torch.Tensor = (velocity.float() - (noise - target)).square().mean()
        return loss


def train(
    model: FlowMatching,
    tokens: Callable[[list[str]], torch.Tensor],
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
    """Train in place up to `steps`, from the checkpoint in `progress` if there is one. Calls `export` with the
    average of the weights in place, from time to time and at the end. `stop_at`: step to stop at earlier,
    to be continued."""
    device = sprites.full.device
    model.train()
    parameters: list[torch.Tensor] = list(model.parameters())
    descent = Descent(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(parameters, AVERAGING)

    def one_step(frame: scenes.Frame, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        *plan, ids, normal = inputs
        pictures = scenes.draw(frame, plan, sprites)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pictures, ids, normal)
        descent.step(loss)
        average.update()
        return {"loss": loss.detach()}

    replay = Replay(one_step, device)
    state = {"model": model, "optimizer": descent, "average": average}
    first = progress.resume("denoiser", state)
    plans = scenes.Plans(seed + DENOISER_STREAM, batch, range(first, min(stop_at, steps)), encode=tokens, **world)
    for step, plan, ids in scenes.loader(plans, workers):
        descent.rate.fill_(cosine_after(rate, step, steps, warm_up=200, start=0.4))
        average.set_step(step)
        height, width = plan.frame.size
        count = batch * model.draws * (1 + height * width * LATENT_CHANNELS // 64)
        normal = torch.randn(count, generator=scenes.seeded(device, seed, DENOISER_STREAM, step), device=device)
        progress.step("denoiser", step + 1, steps, state, **replay(plan.frame, [*plan.tensors, ids, normal]))
        if (step + 1) % export_every == 0 and step + 1 < steps:
            with average.in_place():
                export()
    if stop_at < steps:
        progress.save("denoiser", stop_at, state)
        return
    with average.in_place():
        export()
