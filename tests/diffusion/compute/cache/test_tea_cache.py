"""TeaCache against its published loop, written down again over diffusers' own transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from testbed.runner_driver import make_request, psnr
from tests.diffusion.compute.cache.driving import draw

STEPS = 20
REQUEST = make_request(
    "r", negative_prompt="a blue car", num_inference_steps=STEPS, height=64, width=80, true_cfg_scale=3.0, seed=7
)
QUARTIC = (-450.0, 280.0, -45.0, 3.2, -0.02)


class PublishedLoop(nn.Module):
    """All blocks of the transformer as one, with the state of two guidance branches that take turns."""

    def __init__(self, blocks: nn.ModuleList, threshold: float, coefficients: tuple[float, ...]) -> None:
        super().__init__()
        self.inner = blocks
        self.threshold = threshold
        self.rescale = np.poly1d(coefficients)
        self.branches: list[dict[str, Any]] = [{"cnt": 0, "skipped": []} for _ in range(2)]
        self.calls = 0

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        state = self.branches[self.calls % 2]
        self.calls += 1
        first: Any = self.inner[0]
        shift, scale, _ = first.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0].chunk(3, dim=-1)
        modulated_inp = first.img_norm1(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        if state["cnt"] in (0, STEPS - 1):
            should_calc, state["accumulated"] = True, 0.0
        else:
            previous = state["previous"]
            state["accumulated"] += self.rescale(
                ((modulated_inp - previous).abs().mean() / previous.abs().mean()).item()
            )
            should_calc = not state["accumulated"] < self.threshold
            if should_calc:
                state["accumulated"] = 0.0
        state["previous"] = modulated_inp
        state["cnt"] += 1
        if not should_calc:
            state["skipped"].append(state["cnt"] - 1)
            return encoder_hidden_states, hidden_states + state["residual"]
        before = hidden_states
        for block in self.inner:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, **kwargs)
        state["residual"] = hidden_states - before
        return encoder_hidden_states, hidden_states


def published(path: Path, threshold: float, coefficients: tuple[float, ...]) -> tuple[np.ndarray, list[list[int]]]:
    pipe = QwenImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    loop = PublishedLoop(pipe.transformer.transformer_blocks, threshold, coefficients)
    pipe.transformer.transformer_blocks = nn.ModuleList([loop])
    image = pipe(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        height=REQUEST.height,
        width=REQUEST.width,
        num_inference_steps=STEPS,
        true_cfg_scale=REQUEST.true_cfg_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        output_type="np",
    ).images[0]
    return (image * 255).round().astype(np.uint8), [branch["skipped"] for branch in loop.branches]


@pytest.mark.parametrize(
    ("threshold", "coefficients"),
    [(0.15, (1.0, 0.0)), (0.4, (1.0, 0.0)), (0.2, QUARTIC), (0.1, (2.0, -1.0, 0.5, 0.01))],
)
def test_the_published_loop_skips_the_same_steps_and_draws_the_same_picture(
    calm_model: Path, threshold: float, coefficients: tuple[float, ...]
) -> None:
    wanted, wanted_skips = published(calm_model, threshold, coefficients)
    config = {"rel_l1_thresh": threshold, "coefficients": coefficients}

    drive, skips = draw(calm_model, "tea_cache", config, {0: [REQUEST]})

    assert 3 <= len(wanted_skips[0]) < STEPS - 2
    assert skips["r"] == wanted_skips
    assert psnr(drive.images["r"], wanted) >= 75


def test_the_models_own_polynomial_is_taken_where_none_is_given(calm_model: Path) -> None:
    _, given = draw(calm_model, "tea_cache", {"coefficients": QUARTIC}, {0: [REQUEST]})
    _, own = draw(calm_model, "tea_cache", {}, {0: [REQUEST]})
    assert own == given
