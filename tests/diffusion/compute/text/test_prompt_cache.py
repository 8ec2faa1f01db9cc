from __future__ import annotations

import torch

from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache


def test_the_least_recently_used_prompt_is_dropped() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> torch.Tensor:
        encoded.append(prompt)
        return torch.zeros(len(prompt), 2)

    cache = PromptCache(encode, max_bytes=8 * 10)
    for prompt in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        assert cache(prompt).shape == (4, 2)
    assert encoded == ["aaaa", "bbbb", "cccc", "bbbb"]
    assert (len(cache), cache.num_bytes) == (2, 64)
    assert cache("d" * 11).shape == (11, 2), "what never fits is still encoded"
    assert cache.num_bytes <= 80


def test_a_large_input_is_found_by_its_key() -> None:
    seen: list[str] = []

    def encode(value: tuple[str, ...]) -> torch.Tensor:
        seen.append(value[0])
        return torch.zeros(1)

    cache = PromptCache(encode, 100, key_of=lambda value: value[0])
    for value in (("a", "large"), ("a", "the same"), ("b", "another")):
        cache(value)
    assert seen == ["a", "b"]
    assert len(cache) == 2
