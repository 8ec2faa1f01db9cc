"""Facts of a request, by which a checkpoint is told from those of other requests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from testbed.fakes import make_request
from vllm_omni.diffusion.compute.step.saved_state import request_facts
from vllm_omni.diffusion.messages.checkpoint import CheckpointValue
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.inputs.images import InputImage

PIXELS = np.zeros((16, 16, 3), np.uint8)
REQUEST = make_request(sigmas=(1.0, 0.5), images=(InputImage.of(PIXELS, PIXELS),))
OTHERS: dict[type, Any] = {str: "other", int: 9, float: 0.25, bool: False, type(None): 2.5}
NO_FACTS: dict[str, Any] = {"request_id": "r2", "cache": False, "loras": (LoRA("a", "/a.safetensors", 1.0),)}
"""Fields that a checkpoint's request may differ in, or that the family tells."""


@pytest.mark.parametrize("name", [field.name for field in fields(DiffusionRequest)])
def test_a_request_that_differs_in_a_field_has_other_facts(name: str) -> None:
    value = getattr(REQUEST, name)
    if name in NO_FACTS:
        assert request_facts(replace(REQUEST, **{name: NO_FACTS[name]})) == request_facts(REQUEST)
        return
    others: dict[str, Any] = {"images": (InputImage.of(PIXELS + 1, PIXELS),), "sigmas": (1.0, 0.25)}
    changes: dict[str, Any] = {name: others.get(name, OTHERS.get(type(value)))}
    other = replace(REQUEST, **changes)
    before, after = request_facts(REQUEST), request_facts(other)
    changed = {fact for fact in before if before[fact] != after[fact]}
    assert changed == {"prompts" if "prompt" in name else name}


def test_facts_travel_and_show_no_prompt() -> None:
    facts = request_facts(REQUEST)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(facts), type=dict[str, CheckpointValue]) == facts
    assert REQUEST.prompt not in str(facts)
