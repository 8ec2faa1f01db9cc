"""Sampling functions against diffusers' and against their definitions."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline, calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from vllm_omni.diffusion.compute.step.sampling import (
    combine_bounded,
    combine_guidance,
    draw_noise,
    linear_sigmas,
    pack_latents,
    predict_clean,
    resolution_shift,
    unpack_latents,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_diffusers_noise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    wanted = randn_tensor((1, 1, 16, 6, 10), generator=generator, device=CPU, dtype=dtype)[0, 0]
    assert torch.equal(draw_noise((16, 6, 10), 11, dtype, CPU), wanted)


def test_latents_are_laid_out_as_in_diffusers() -> None:
    latents = torch.randn(16, 6, 10)
    tokens = pack_latents(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents[None, None], 1, 16, 6, 10)[0])
    assert torch.equal(unpack_latents(tokens, 3, 5), latents)
    assert torch.equal(QwenImagePipeline._unpack_latents(tokens[None], 48, 80, 8)[0, :, 0], latents)


@pytest.mark.parametrize("num_tokens", [16, 256, 4096, 16384])
def test_the_shift_is_diffusers_shift(num_tokens: int) -> None:
    wanted = calculate_shift(num_tokens, 256, 8192, 0.5, 0.9)
    assert resolution_shift(num_tokens, 256, 8192, 0.5, 0.9) == pytest.approx(wanted, rel=1e-12)


def test_sigmas_fall_evenly() -> None:
    assert linear_sigmas(4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert linear_sigmas(1) == [1.0]


def test_guidance_keeps_the_norm_of_each_token() -> None:
    positive, negative = torch.randn(2, 5, 8).unbind()
    combined = combine_guidance(positive, negative, 3.0)
    torch.testing.assert_close(combined.norm(dim=-1), positive.norm(dim=-1))
    direction = torch.nn.functional.cosine_similarity(combined, negative + 3 * (positive - negative))
    torch.testing.assert_close(direction, torch.ones(5))
    torch.testing.assert_close(combine_guidance(positive, negative, 1.0), positive)


def test_the_clean_picture_is_found_from_the_true_velocity() -> None:
    clean, noise = torch.randn(2, 5, 8).unbind()
    torch.testing.assert_close(predict_clean(0.3 * clean + 0.7 * noise, noise - clean, 0.7), clean)


def test_guidance_is_held_to_a_length() -> None:
    positive, negative = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert torch.equal(combine_bounded(positive, negative, 4.0, 0.0), 4 * positive)
    torch.testing.assert_close(combine_bounded(positive, negative, 4.0, 2.0), 2 * positive)
    torch.testing.assert_close(combine_bounded(positive, negative, 1.5, 2.0), 1.5 * positive)


@pytest.mark.parametrize("channels_last", [False, True])
def test_latents_are_unpacked_as_they_were_packed(channels_last: bool) -> None:
    latents = torch.randn(16, 6, 10)
    packed = pack_latents(latents, channels_last)
    assert torch.equal(unpack_latents(packed, 3, 5, channels_last), latents)
    # The second token begins where the second patch does; its second channel is the next pixel's or the next channel's.
    assert packed[1, 0] == latents[0, 0, 2]
    assert packed[1, 1] == (latents[1, 0, 2] if channels_last else latents[0, 0, 3])
