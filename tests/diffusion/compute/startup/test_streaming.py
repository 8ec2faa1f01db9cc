"""Rates of a model whose blocks stream, and the memory that is kept free beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import make_config, make_ready, make_scheduled
from testbed.runner_driver import QUICK
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.startup.rates import Rates, Sample, knee
from vllm_omni.diffusion.compute.startup.streaming import OTHER_BYTES, beside_copies, reserved_bytes
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.data import OmniDiffusionConfig

COMPUTED = [Sample(tokens=n, units=2.0 * n, seconds=0.01 + 0.001 * n) for n in (256, 512, 1024, 2048, 4096)]
"""Steps of 0.27 to 4.1 s."""


@pytest.mark.parametrize(("copy_seconds", "tokens"), [(0.0, 256), (0.5, 512), (1.0, 1024), (1.9, 2048)])
def test_steps_are_so_large_that_computing_hides_the_copies(copy_seconds: float, tokens: int) -> None:
    assert knee(beside_copies(COMPUTED, copy_seconds)) == tokens


def test_the_price_of_a_token_is_that_of_computing_it() -> None:
    rates = Rates.from_times(COMPUTED, 0.1, 0.1, 2048, copy_seconds=1.9)
    assert rates.seconds_per_unit == pytest.approx(0.0005)
    assert rates.step_overhead_seconds == pytest.approx(0.01)
    assert (rates.copy_seconds, rates.max_batch_tokens) == (1.9, 2048)


@pytest.mark.parametrize(("resident", "copies"), [(0, True), (2, False)])
def test_a_start_measures_the_copies(tiny_model: Path, resident: int, copies: bool) -> None:
    config = OmniDiffusionConfig(str(tiny_model), enable_layerwise_offload=True, resident_layers=resident)
    ready = ModelRunner(config, load_model_info(str(tiny_model)), options=QUICK).start()
    assert (ready.copy_seconds > 0) == copies


def test_a_step_costs_at_least_its_copies() -> None:
    request: Any = make_scheduled(steps=4)
    fast, slow = (Scheduler(make_config(), make_ready(copy_seconds=seconds)) for seconds in (0.0, 0.5))
    assert slow.work_seconds([request]) == pytest.approx(fast.work_seconds([request]) + 4 * (0.5 - 0.001))


def test_memory_of_the_largest_step_or_decode_stays_free(tiny_model: Path) -> None:
    info: Any = load_model_info(str(tiny_model))
    few, many, beside = (
        reserved_bytes(OmniDiffusionConfig(str(tiny_model), max_batch_tokens=tokens, overlap_decode=overlap), info, 2)
        - OTHER_BYTES
        for tokens, overlap in ((1, False), (10**6, False), (10**6, True))
    )
    decode = info.decode_bytes(64, 64, 1, False)
    assert few >= decode
    assert many == info.step_activation_bytes(10**6, 2)
    assert beside == many + decode
