"""Decoder in channels-last memory compared with diffusers' decoder. On a CPU Triton's interpreter runs the kernels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from testbed.tiny_models import randomize
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.z_image.vae import ZImageDecoder
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels, create_kernels
from vllm_omni.diffusion.compute.vae.channels_last import put_channels_last

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL, LARGE = (6, 5), (9, 14)
"""Height and width of latents."""
TILED = (7, 7)
"""Size of four tiles: a tile is 8 x 8, and the next one begins after 6."""


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, compute float32 convolutions in full precision, not with the 10 bits of the default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(**config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        **{
            "latent_channels": 16,
            "block_out_channels": [8, 16, 16],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "sample_size": 32,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **config,
        }
    )
    return randomize(vae).eval().requires_grad_(False).to(DEVICE)


def channels_last(vae: AutoencoderKL) -> AutoencoderKL:
    ours = deepcopy(vae)
    put_channels_last(ours.decoder, create_kernels("triton"))
    return ours


def latents(height: int, width: int, pictures: int = 1) -> Tensor:
    return torch.randn((pictures, 16, height, width), generator=torch.Generator().manual_seed(height)).to(DEVICE)


def decode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(x.to(vae.dtype), return_dict=False)[0]
    return pixels


def is_near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("setting", "size"), [(None, LARGE), ("enable_tiling", TILED), ("enable_slicing", SMALL)], ids=str
)
def test_pictures_equal_those_of_diffusers(setting: str | None, size: tuple[int, int]) -> None:
    vae = build()
    ours = channels_last(vae)
    if setting is not None:
        getattr(vae, setting)()
        getattr(ours, setting)()
    x = latents(*size, pictures=2 if setting == "enable_slicing" else 1)
    assert is_near(decode(ours, x), decode(vae, x))


@pytest.mark.parametrize("config", [{"act_fn": "relu"}, {"mid_block_add_attention": False}])
def test_decoders_with_other_activations(config: dict[str, object]) -> None:
    """The activation after the last norm is SiLU, whatever activation the blocks have."""
    vae = build(**config)
    x = latents(*SMALL)
    assert is_near(decode(channels_last(vae), x), decode(vae, x))


def test_bfloat16_is_as_near_to_float32_as_diffusers() -> None:
    vae = build()
    x = latents(*LARGE).bfloat16()
    exact = decode(vae, x)
    rounded = vae.bfloat16()
    theirs, got = decode(rounded, x), decode(channels_last(rounded), x)
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_every_convolution_gets_channels_last_input() -> None:
    """Another layout would be copied at the next convolution, which costs as much as channels-last gains."""
    ours = channels_last(build())
    seen: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def check(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor) and out.dim() == 4:
                assert out.is_contiguous(memory_format=torch.channels_last), name
                seen.append(name)

        return check

    for name, module in ours.decoder.named_modules():
        module.register_forward_hook(watch(name))
    decode(ours, latents(*SMALL))
    assert {"conv_in", "mid_block.attentions.0", "up_blocks.0.upsamplers.0", "conv_out"} <= set(seen)


def test_weights_keep_their_names_and_values() -> None:
    vae = build()
    before, after = vae.decoder.state_dict(), channels_last(vae).decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_kernels_with_such_a_norm_change_the_layout() -> None:
    for kernels in (None, TorchKernels()):
        vae = build()
        ZImageDecoder(vae, False, False, DecodeGroup.alone(), kernels)
        assert vae.decoder.conv_in.weight.is_contiguous()
        assert isinstance(vae.decoder.conv_norm_out, nn.GroupNorm)
    vae = build()
    ZImageDecoder(vae, False, False, DecodeGroup.alone(), create_kernels("triton"))
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(module, nn.GroupNorm) for module in vae.decoder.modules())
