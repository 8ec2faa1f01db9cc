"""Digests tell changes of weights apart, and not their order in a file."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.compute.weights.adapter_digest import adapter_digest
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile


def test_a_digest_depends_on_names_weights_and_scales_alone() -> None:
    weights = {
        "transformer.a.lora_A.weight": torch.ones(2, 3),
        "transformer.a.lora_B.weight": torch.ones(4, 2),
        "transformer.b.lora_A.weight": torch.ones(2, 3),
        "transformer.b.lora_B.weight": torch.ones(4, 2) * 2,
    }
    digest = adapter_digest(AdapterFile(weights, {}))
    assert adapter_digest(AdapterFile(dict(reversed(weights.items())), {})) == digest
    others = [
        AdapterFile(weights | {"transformer.a.lora_B.weight": torch.ones(4, 2) * 3}, {}),
        AdapterFile({key: weight.half() for key, weight in weights.items()}, {}),
        AdapterFile({key.replace("b.lora", "c.lora"): weight for key, weight in weights.items()}, {}),
        AdapterFile(weights | {"transformer.a.alpha": torch.tensor(1.0)}, {}),
        AdapterFile(weights, {"": {"lora_alpha": 1}}),
    ]
    digests = {adapter_digest(contents) for contents in others}
    assert len(digests) == len(others)
    assert digest not in digests
