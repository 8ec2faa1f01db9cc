"""Prices of requests with adapters, from the headers of the adapters' files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.diffusion.control.builders import INFO, READY, WHOLE
from vllm_omni.diffusion.control.adapter_prices import num_adapter_weights
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt

RANK, WIDTH = 4, 64
PAIR = 2 * RANK * WIDTH
"""Weights of A and B of one layer."""


def save(file: Path, *layers: str, rank: int = RANK, kohya: bool = False) -> LoRA:
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    weights = {f"{layer}.{down}.weight": np.ones((rank, WIDTH), np.float16) for layer in layers}
    weights |= {f"{layer}.{up}.weight": np.ones((WIDTH, rank), np.float16) for layer in layers}
    if kohya:
        weights |= {f"{layer}.alpha": np.ones((), np.float16) for layer in layers}
    save_file(weights, file)
    return LoRA(file.stem, str(file), 1.0)


@pytest.mark.parametrize(
    ("layers", "kohya", "num_pairs"),
    [
        (("transformer.blocks.0.to_q", "transformer.blocks.0.img_mlp.net.2"), False, 2),
        (("lora_unet_blocks_0_to_q", "lora_unet_blocks_0_img_mod_1"), True, 1),
        (("diffusion_model.layers.0.adaLN_modulation.0", "diffusion_model.layers.0.attention.to_q"), False, 1),
        (("transformer.time_text_embed.timestep_embedder.linear_1",), False, 0),
        # A step runs one of the two transformers of Wan 2.2.
        (("transformer.blocks.0.q", "transformer_2.blocks.0.q", "transformer_2.blocks.0.k"), False, 2),
    ],
)
def test_weights_of_the_layers_of_tokens_are_counted(
    tmp_path: Path, layers: tuple[str, ...], kohya: bool, num_pairs: int
) -> None:
    assert num_adapter_weights([save(tmp_path / "a.safetensors", *layers, kohya=kohya)]) == num_pairs * PAIR


def test_a_file_is_read_again_when_it_changes_and_costs_nothing_when_it_cannot_be_read(tmp_path: Path) -> None:
    lora = save(tmp_path / "blob", "transformer.q")
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "ink.safetensors"  # as in the cache of Hugging Face
    link.symlink_to(tmp_path / "blob")
    linked = replace(lora, path=str(link))
    assert num_adapter_weights([lora, linked]) == 2 * PAIR
    save(tmp_path / "new", "transformer.q", "transformer.k", rank=2 * RANK)
    os.replace(tmp_path / "new", tmp_path / "blob")
    assert num_adapter_weights([linked]) == 4 * PAIR
    (tmp_path / "blob").write_bytes(b"no adapter")
    assert num_adapter_weights([linked]) == 0
    (tmp_path / "blob").unlink()
    assert num_adapter_weights([linked]) == 0


def test_a_request_pays_for_each_of_its_adapters(tmp_path: Path) -> None:
    loras = [save(tmp_path / f"{name}.safetensors", f"transformer.{name}") for name in "ab"]
    asked = [LoRARequest(lora.name, lora.path) for lora in loras]
    ready = replace(READY, step_overhead_seconds=5e-3)  # 5 units
    prices = []
    for count in range(3):
        builder = RequestBuilder(OmniDiffusionConfig("demo"), INFO, ready)
        params = OmniDiffusionSamplingParams(lora_request=asked[:count], true_cfg_scale=4.0)
        (request,) = builder.build(OmniPrompt("x y", negative_prompt="z"), params, "r")
        prices.append(request.cost)
    num_tokens = sum(prices[0].branch_tokens)
    weights_of_a_token = 2 * (INFO.num_heads * INFO.head_dim) * INFO.attention_tokens * INFO.num_blocks
    one = num_tokens * PAIR / weights_of_a_token + 5
    assert prices[1].step == pytest.approx(prices[0].step + one)
    assert prices[2].step == pytest.approx(prices[0].step + 2 * one)
    assert {(cost.encode, cost.decode, cost.branch_tokens) for cost in prices} == {
        (prices[0].encode, prices[0].decode, prices[0].branch_tokens)
    }
    two_streams = replace(INFO, num_streams=2)
    assert two_streams.adapter_cost(PAIR) == pytest.approx(INFO.adapter_cost(PAIR) / 2)
    assert WHOLE.adapter_cost(PAIR) == 0, "sizes of a whole pipeline's layers are not known"
