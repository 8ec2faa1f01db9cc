"""Steps of diffusers' transformers, with the same weights as ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel

from benchmarks.gpu.bench import Bench, Size
from vllm_omni.diffusion.compute.families.wan.info import MAX_PROMPT_TOKENS
from vllm_omni.diffusion.compute.step.sampling import combine_guidance
from vllm_omni.diffusion.compute.weights.loading import load_weights

StepOf = Callable[[Size], Callable[[], object]]
"""Function of a loaded model: takes a size, returns a function that runs one step of one picture of that size."""


def start_diffusers(bench: Bench, model: str, compiled: bool) -> StepOf:
    """Load a diffusers transformer, eager or with its repeated blocks compiled as diffusers recommends."""
    cls, step_of = {
        "qwen-image": (QwenImageTransformer2DModel, _qwen_image_step),
        "z-image": (ZImageTransformer2DModel, _z_image_step),
    }.get(model, (WanTransformer3DModel, _wan_step))
    bench.start_afresh()
    folder = Path(bench.model(model)) / "transformer"
    with init_empty_weights():
        transformer = cls.from_config(cls.load_config(folder))
    buffers = dict(transformer.named_buffers())  # computed, and in no checkpoint: loading leaves them empty
    # Named as in the checkpoint, so the weights are the same as ours.
    load_weights(transformer, folder, {}, bench.device, _dtype(bench), load_format="dummy")
    for name, buffer in buffers.items():
        transformer.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer.to(bench.device), persistent=False
        )
    _keep_in_float32(transformer)
    if compiled and bench.device.type == "cuda":  # on a CPU compiling takes too long
        transformer.compile_repeated_blocks()
    return partial(step_of, bench, transformer)


def _keep_in_float32(transformer: Any) -> None:
    """Make the modules wide that diffusers loads in float32 beside any dtype."""
    names = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if names & set(name.split(".")):
            parameter.data = parameter.data.float()


def _qwen_image_step(bench: Bench, transformer: Any, size: Size) -> Callable[[], object]:
    """Function of a guided step: one forward for each branch, then their combination."""
    (branches,) = bench.branches("qwen-image", [size])
    width, channels = transformer.config.joint_attention_dim, transformer.config.in_channels
    latents = _random(bench, 1, branches[0].image, channels)
    texts = [_random(bench, 1, branch.text, width) for branch in branches]
    timestep = torch.full((1,), 0.5, device=bench.device, dtype=_dtype(bench))
    grid = [[(1, size[0] // 16, size[1] // 16)]]

    def step() -> None:
        positive, negative = (
            transformer(
                hidden_states=latents,
                timestep=timestep,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                img_shapes=grid,
                return_dict=False,
            )[0]
            for text in texts
        )
        combine_guidance(positive, negative, 4.0)

    return step


def _z_image_step(bench: Bench, transformer: Any, size: Size) -> Callable[[], object]:
    """Function of a step without guidance: one forward; pictures and texts are lists."""
    ((branch,),) = bench.branches("z-image", [size])
    latents = [_random(bench, transformer.config.in_channels, 1, size[0] // 8, size[1] // 8)]
    texts = [_random(bench, branch.text, transformer.config.cap_feat_dim)]
    timestep = torch.full((1,), 0.5, device=bench.device, dtype=torch.float32)
    return lambda: transformer(latents, timestep, texts, return_dict=False)


def _wan_step(bench: Bench, transformer: Any, size: Size) -> Callable[[], object]:
    """Function of one guidance branch: a forward of one video; a step with guidance takes two."""
    height, width, frames = size
    shape = (transformer.config.in_channels, 1 + (frames - 1) // 4, height // 8, width // 8)
    latents = _random(bench, 1, *shape)
    text = _random(bench, 1, MAX_PROMPT_TOKENS, transformer.config.text_dim)
    timestep = torch.full((1,), 500.0, device=bench.device)
    return lambda: transformer(latents, timestep, text, return_dict=False)


def _dtype(bench: Bench) -> torch.dtype:
    return torch.bfloat16 if bench.device.type == "cuda" else torch.float32


def _random(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=bench.device, dtype=_dtype(bench))
