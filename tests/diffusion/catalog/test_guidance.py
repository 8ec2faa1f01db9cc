"""The rule that decides whether a request has guidance."""

from __future__ import annotations

import pytest

from vllm_omni.diffusion.catalog.model_info import Guidance

QWEN_IMAGE = Guidance()
Z_IMAGE = Guidance("guidance_scale", 1.0, "", ("cfg_normalization",))
WHOLE = Guidance("guidance_scale", needs_negative_prompt=False)


@pytest.mark.parametrize(
    ("guidance", "scale", "negative_prompt", "expected"),
    [
        (QWEN_IMAGE, 4.0, "bad", (4.0, "bad")),
        (QWEN_IMAGE, 4.0, None, (1.0, None)),
        (QWEN_IMAGE, 1.0, "bad", (1.0, "bad")),
        (QWEN_IMAGE, None, "bad", (1.0, "bad")),
        (Z_IMAGE, 3.0, None, (4.0, "")),
        (Z_IMAGE, 3.0, "bad", (4.0, "bad")),
        (Z_IMAGE, 0.0, None, (1.0, None)),
        (WHOLE, 5.0, None, (5.0, None)),
        (WHOLE, 1.0, None, (1.0, None)),
        (WHOLE, 0.5, "bad", (0.5, "bad")),
    ],
)
def test_a_scale_above_one_is_guidance(
    guidance: Guidance, scale: float | None, negative_prompt: str | None, expected: tuple[float, str | None]
) -> None:
    assert guidance.resolved(scale, negative_prompt) == expected
