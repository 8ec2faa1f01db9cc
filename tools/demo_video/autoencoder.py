"""Training the autoencoder on random clips, in one pass over all frames.

diffusers' AutoencoderKLWan encodes and decodes in chunks of frames with a cache. The functions here compute the same
numbers for a whole clip at once, with 2D convolutions over stacked frames, which GPUs do fast for few channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock

from ..demo_model.autoencoder import divergence, reconstruction_loss
from ..demo_model.descent import Descent
from ..demo_model.network import LATENT_CHANNELS
from ..demo_model.progress import Progress
from ..demo_model.replay import Replay
from ..demo_model.scenes import Sprites, seeded
from .clips import ClipPlan, Footage, draw_clips, plan_clips
from .network import LATENT_SHAPE
from .pacing import Pace

AUTOENCODER_STREAM = 11
STATISTICS_STREAM = 12
WARM_UP, HELD = 100, 0.3


def channels_last(frames: torch.Tensor, clips: int) -> torch.Tensor:
    """Frames [clips * frames, channels, height, width] as [clips, frames, height, width, channels], without a copy
    where the memory is channels-last."""
    by_clip: torch.Tensor = frames.permute(0, 2, 3, 1).unflatten(0, (clips, -1))
    return by_clip


def channels_first(frames: torch.Tensor) -> torch.Tensor:
    """The inverse of `channels_last`, without a copy."""
    return frames.flatten(0, 1).permute(0, 3, 1, 2)


def stack_taps(frames: torch.Tensor, clips: int, taps: int) -> torch.Tensor:
    """Every frame with the `taps - 1` frames before it in its channels, the oldest first; before a clip's first frame
    are zeros. Frames of a clip follow each other: [clips * frames, channels, height, width]."""
    by_clip = channels_last(frames, clips)
    length = by_clip.shape[1]
    padded = F.pad(by_clip, (0, 0, 0, 0, 0, 0, taps - 1, 0))
    return channels_first(torch.cat([padded[:, i : i + length] for i in range(taps)], 4))


def convolve(stacked: torch.Tensor, convolution: Any) -> torch.Tensor:
    """Causal 3D convolution as a 2D one over stacked frames."""
    weight = convolution.weight.transpose(1, 2).flatten(1, 2)  # [out, taps * in, height, width]
    padding = (convolution._padding[2], convolution._padding[0])
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(stacked, weight, convolution.bias, padding=padding)


def activate(frames: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Root mean square norm over channels, and SiLU."""
    wide = frames.float()
    size = wide.square().mean(1, keepdim=True).clamp_min(1e-24).sqrt()
    return F.silu(wide / size * gamma).to(frames.dtype)


def activate_and_stack(frames: torch.Tensor, gamma: torch.Tensor, clips: int) -> torch.Tensor:
    return stack_taps(activate(frames, gamma), clips, 3)


_fused = {"activate_and_stack": activate_and_stack}


def compile_activations() -> None:
    """Compile norm, activation and stacking into one kernel for each number of channels and size."""
    torch._dynamo.config.recompile_limit = 64
    _fused["activate_and_stack"] = torch.compile(activate_and_stack, dynamic=False)


def _activated(frames: torch.Tensor, norm: Any, clips: int) -> torch.Tensor:
    return _fused["activate_and_stack"](frames, norm.gamma[:, 0], clips)


def _residual(x: torch.Tensor, block: Any, clips: int) -> torch.Tensor:
    y = convolve(_activated(x, block.norm1, clips), block.conv1)
    y = convolve(_activated(y, block.norm2, clips), block.conv2)
    shortcut = block.conv_shortcut
    return y + (x if isinstance(shortcut, torch.nn.Identity) else convolve(x, shortcut))


def _halved(x: torch.Tensor, layer: Any, clips: int) -> torch.Tensor:
    x = layer.resample(x)
    if layer.mode != "downsample3d" or len(x) == clips:
        return x
    by_clip = channels_last(x, clips)
    length = by_clip.shape[1]
    # The first frame stays alone; every second later one takes in the two before it.
    windows = torch.cat([by_clip[:, i : length - 2 + i : 2] for i in range(3)], 4)
    later = channels_last(convolve(channels_first(windows), layer.time_conv), clips)
    return channels_first(torch.cat([by_clip[:, :1], later], 1))


def _doubled(x: torch.Tensor, layer: Any, clips: int) -> torch.Tensor:
    if layer.mode == "upsample3d" and len(x) > clips:
        by_clip = channels_last(x, clips)
        # The first frame stays alone and later ones do not see it; each later one becomes two.
        later = convolve(stack_taps(channels_first(by_clip[:, 1:]), clips, 3), layer.time_conv)
        pairs = channels_last(later, clips).unflatten(4, (2, -1)).movedim(4, 2).flatten(1, 2)
        x = channels_first(torch.cat([by_clip[:, :1], pairs], 1))
    # Nearest neighbours are exact in every dtype.
    enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    result: torch.Tensor = layer.resample[1](enlarged)
    return result


def _layers(x: torch.Tensor, layers: Any, clips: int) -> torch.Tensor:
    for layer in layers:
        if isinstance(layer, WanResidualBlock):
            x = _residual(x, layer, clips)
        elif isinstance(layer, WanAttentionBlock):
            x = layer(x[:, :, None])[:, :, 0]
        elif isinstance(layer, WanResample):
            x = _doubled(x, layer, clips) if layer.mode.startswith("up") else _halved(x, layer, clips)
        else:
            raise TypeError(f"unknown layer of the autoencoder: {type(layer).__name__}")
    return x


def _middle(block: Any) -> list[Any]:
    return [block.resnets[0], block.attentions[0], block.resnets[1]]


def _head(x: torch.Tensor, coder: Any, clips: int) -> torch.Tensor:
    return convolve(_activated(x, coder.norm_out, clips), coder.conv_out)


def as_frames(clips: torch.Tensor) -> torch.Tensor:
    """Frames in channels-last memory, [n * frames, channels, height, width], of clips [n, channels, frames, ...]."""
    return clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def as_clips(frames: torch.Tensor, clips: int) -> torch.Tensor:
    by_clip: torch.Tensor = frames.unflatten(0, (clips, -1))
    return by_clip.transpose(1, 2)


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents, each [n, 16, 1 + (frames - 1) / 4, height / 8, width / 8]."""
    count, encoder = len(clips), vae.encoder
    x = convolve(stack_taps(as_frames(clips), count, 3), encoder.conv_in)
    x = _layers(x, [*encoder.down_blocks, *_middle(encoder.mid_block)], count)
    moments = as_clips(convolve(_head(x, encoder, count), vae.quant_conv), count).float()
    return moments[:, :LATENT_CHANNELS], moments[:, LATENT_CHANNELS:].clamp(-12, 4)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips from latents, [n, 3, frames, height, width], not clamped."""
    count, decoder = len(latents), vae.decoder
    x = convolve(as_frames(latents), vae.post_quant_conv)
    x = convolve(stack_taps(x, count, 3), decoder.conv_in)
    layers = _middle(decoder.mid_block)
    for block in decoder.up_blocks:
        layers += [*block.resnets, *(block.upsamplers or [])]
    return as_clips(_head(_layers(x, layers, count), decoder, count), count).float()


def loss_of(vae: AutoencoderKLWan, clips: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss and the plain mean square error of one batch."""
    mean, log_variance = encode(vae, clips)
    drawn = decode(vae, mean + noise * (0.5 * log_variance).exp())
    error = drawn - clips
    flicker = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    loss = reconstruction_loss(as_frames(drawn), as_frames(clips)) + 0.5 * flicker
    return loss + 1e-4 * divergence(mean, log_variance), error.detach().square().mean()


def train(
    vae: AutoencoderKLWan, sprites: Sprites, progress: Progress, pace: Pace, *, seed: int, batch: int, rate: float
) -> None:
    """Train in place for the steps of `pace`, from the checkpoint in `progress` if there is one."""
    device = sprites.full.device
    vae.train()
    descent = Descent(list(vae.parameters()), betas=(0.9, 0.99), weight_decay=0.0)

    def one_step(footage: Footage, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        *plan, noise = inputs
        clips = draw_clips(footage, plan, sprites)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, square_error = loss_of(vae, clips, noise)
        descent.step(loss)
        return {"loss": loss.detach(), "square_error": square_error}

    replay = Replay(one_step, device)
    state = {"vae": vae, "optimizer": descent, "pace": pace}
    for step in pace.steps_from(progress.resume("autoencoder", state)):
        descent.rate.fill_(pace.cosine(rate, step, WARM_UP, HELD))
        plan = plan_clips(seed + AUTOENCODER_STREAM, step, batch)
        generator = seeded(device, seed, AUTOENCODER_STREAM, step)
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator, device=device)
        values = replay(plan.footage, [*plan.tensors, noise])
        progress.step("autoencoder", step + 1, pace.count, state, **values)
    vae.eval()


def on_device(plan: ClipPlan, sprites: Sprites) -> torch.Tensor:
    """The plan's clips, drawn on the sprites' device."""
    return draw_clips(plan.footage, [x.to(sprites.full.device) for x in plan.tensors], sprites)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, sprites: Sprites, seed: int, batches: int, batch: int) -> float:
    """Write the latents' mean and deviation into the config; return the reconstruction's PSNR in dB."""
    total = torch.zeros(2, LATENT_CHANNELS, dtype=torch.float64)
    places, psnr = 0, []
    for step in range(batches):
        clips = on_device(plan_clips(seed + STATISTICS_STREAM, step, batch), sprites)
        latents, _ = encode(vae, clips)
        flat = latents.transpose(0, 1).flatten(1).double().cpu()
        total += torch.stack([flat.sum(1), flat.square().sum(1)])
        places += flat.shape[1]
        error = (decode(vae, latents).clamp(-1, 1) - clips) / 2
        psnr += (-10 * torch.log10(error.square().mean((1, 2, 3, 4)))).tolist()
    mean = total[0] / places
    deviation = (total[1] / places - mean.square()).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return math.fsum(psnr) / len(psnr)
