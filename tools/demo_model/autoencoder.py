"""Training the autoencoder on random scenes: L1 at two scales, picture gradients and a little KL."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from . import scenes
from .descent import Descent
from .network import LATENT_CHANNELS
from .progress import Progress, cosine_after
from .replay import Replay

AUTOENCODER_STREAM = 1
STATISTICS_STREAM = 2


def encode(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of single frames, [n, 16, height / 8, width / 8]."""
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    moments = vae.quant_conv(vae.encoder(pictures.unsqueeze(2)))[:, :, 0].float()
    return moments[:, :LATENT_CHANNELS], moments[:, LATENT_CHANNELS:].clamp(-12, 4)


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    latents = latents.contiguous(memory_format=torch.channels_last)
    frames: torch.Tensor = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))
    return frames[:, :, 0].float()


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(drawn: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """L1 at two scales, picture gradients and square error of pictures [n, 3, height, width]."""
    error = drawn - pictures
    edges = sum(x.abs().mean() for x in differences(error))
    return error.abs().mean() + F.avg_pool2d(error, 4).abs().mean() + 0.5 * edges + 2 * error.square().mean()


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the latents' distribution from the normal one, per number."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def loss_of(
    vae: AutoencoderKLQwenImage, pictures: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss and the plain mean square error of one batch."""
    mean, log_variance = encode(vae, pictures)
    drawn = decode(vae, mean + noise.view_as(mean) * (0.5 * log_variance).exp())
    loss = reconstruction_loss(drawn, pictures) + 1e-4 * divergence(mean, log_variance)
    return loss, (drawn - pictures).detach().square().mean()


def train(
    vae: AutoencoderKLQwenImage,
    sprites: scenes.Sprites,
    progress: Progress,
    *,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    workers: int,
) -> None:
    """Train in place up to `steps`, from the checkpoint in `progress` if there is one."""
    device = sprites.full.device
    vae.train()
    parameters = [p for name, p in vae.named_parameters() if "time_conv" not in name]
    descent = Descent(parameters, betas=(0.9, 0.99), weight_decay=0.0)

    def one_step(frame: scenes.Frame, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        *plan, noise = inputs
        pictures = scenes.draw(frame, plan, sprites)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, square_error = loss_of(vae, pictures, noise)
        descent.step(loss)
        return {"loss": loss.detach(), "square_error": square_error}

    replay = Replay(one_step, device)
    state = {"vae": vae, "optimizer": descent}
    first = progress.resume("autoencoder", state)
    for step, plan, _ in scenes.loader(scenes.Plans(seed + AUTOENCODER_STREAM, batch, range(first, steps)), workers):
        descent.rate.fill_(cosine_after(rate, step, steps, warm_up=100, start=0.2))
        height, width = plan.frame.size
        generator = scenes.seeded(device, seed, AUTOENCODER_STREAM, step)
        noise = torch.randn(batch * LATENT_CHANNELS * height * width // 64, generator=generator, device=device)
        progress.step("autoencoder", step + 1, steps, state, **replay(plan.frame, [*plan.tensors, noise]))
    vae.eval()


def statistics_batches(sprites: scenes.Sprites, seed: int, count: int, batch: int) -> Iterator[torch.Tensor]:
    for step in range(count):
        plan = scenes.plan_batch(seed + STATISTICS_STREAM, step, batch)
        yield scenes.draw(plan.frame, [x.to(sprites.full.device) for x in plan.tensors], sprites)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLQwenImage, sprites: scenes.Sprites, seed: int, batches: int) -> float:
    """Write the latents' mean and deviation into the config; return the reconstruction's PSNR in dB."""
    total = torch.zeros(2, LATENT_CHANNELS, dtype=torch.float64)
    places, psnr = 0, []
    for pictures in statistics_batches(sprites, seed, batches, 64):
        latents, _ = encode(vae, pictures)
        flat = latents.transpose(0, 1).flatten(1).double().cpu()
        total += torch.stack([flat.sum(1), flat.square().sum(1)])
        places += flat.shape[1]
        error = (decode(vae, latents).clamp(-1, 1) - pictures) / 2
        psnr += (-10 * torch.log10(error.square().mean((1, 2, 3)))).tolist()
    mean = total[0] / places
    deviation = (total[1] / places - mean.square()).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return math.fsum(psnr) / len(psnr)
