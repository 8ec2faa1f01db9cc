"""Layers of default parameters, and the defaults that adapters bring."""

from __future__ import annotations

from typing import Any

import pytest

from tests.diffusion.control.builders import builder
from vllm_omni.diffusion.control.default_values import common_recipe, fill, layered
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

SIGMAS = (1.0, 0.6, 0.2)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"seed": 1}, {"seed": 2, "strength": 0.5}], {"seed": 1, "strength": 0.5}),
        ([{"seconds": 2.0}, {"num_frames": 9}], {"seconds": 2.0}),
        ([{"num_frames": 5}, {"seconds": 2.0}, {"num_frames": 9}], {"num_frames": 5}),
        ([{"sigmas": SIGMAS}, {"num_inference_steps": 50}], {"sigmas": SIGMAS}),
        ([{"num_inference_steps": 50}, {"sigmas": SIGMAS}], {"num_inference_steps": 50}),
        ([{"num_inference_steps": 3}, {"sigmas": SIGMAS}], {"num_inference_steps": 3, "sigmas": SIGMAS}),
        ([{"lora_request": []}, {"lora_request": ["ink"], "lora_scale": 0.5}], {"lora_request": []}),
    ],
)
def test_a_value_hides_those_beneath_it_that_say_the_same(
    layers: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    assert layered(*layers) == expected


def test_the_number_of_steps_follows_from_sigmas() -> None:
    params = OmniDiffusionSamplingParams
    defaults = {"num_inference_steps": 50, "sigmas": None}
    assert fill(params(sigmas=SIGMAS), defaults).num_inference_steps == 3
    server = builder(default_sampling_params={"sigmas": list(SIGMAS)})
    for given, steps, sigmas in ((None, 3, SIGMAS), (5, 5, None)):
        (built,) = server.build(OmniPrompt("x"), params(num_inference_steps=given), "r")
        assert (built.request.num_inference_steps, built.request.sigmas) == (steps, sigmas)


def test_adapters_of_one_request_must_agree_unless_it_decides() -> None:
    recipes: dict[str, dict[str, Any]] = {
        "fast": {"num_inference_steps": 4, "true_cfg_scale": 1.0},
        "ink": {"true_cfg_scale": 1.0, "seed": 3},
        "slow": {"num_inference_steps": 30},
    }
    agreed = {name: recipes[name] for name in ("fast", "ink")}
    assert common_recipe(agreed, {}) == {"num_inference_steps": 4, "true_cfg_scale": 1.0, "seed": 3}
    with pytest.raises(InvalidRequestError) as refused:
        common_recipe(recipes, {})
    assert refused.value.param == "num_inference_steps"
    assert str(refused.value) == (
        "num_inference_steps: the adapters 'fast' and 'slow' have different defaults, 4 and 30: "
        "give num_inference_steps"
    )
    assert "num_inference_steps" not in common_recipe(recipes, {"num_inference_steps": 8})
    assert "num_inference_steps" not in common_recipe(recipes, {"sigmas": SIGMAS})
    with pytest.raises(InvalidRequestError, match="'fast' and 'long' have different defaults, 4 and '3 sigmas'"):
        common_recipe({"fast": recipes["fast"], "long": {"sigmas": SIGMAS}}, {})
