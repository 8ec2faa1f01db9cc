"""Warm-up of a packed family: choose threads, have code compiled, measure rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import PeerFailedError, Ranks
from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Rates, Sample, knee
from vllm_omni.diffusion.compute.startup.thread_choice import set_threads
from vllm_omni.diffusion.compute.startup.warmup_requests import COMMON_PROMPT, warmup_request
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, RequestState
from vllm_omni.diffusion.messages.placement import balance

MAX_TOKENS = 2**15
"""Most tokens of a step that the warm-up tries."""
REPEATS, CAPTURED_REPEATS = 3, 4
"""Timed runs per step; one more with CUDA graphs, because capture happens on run 2."""

VARIANT_STEPS = 3
"""Steps of the request that code is compiled with: one of two transformers computes at least two of them."""

RunVariants = Callable[[PackedPipeline[Any], RequestState, Ranks], object]
"""Runs every kind of step for which code is compiled, from a state of `VARIANT_STEPS` steps."""


@dataclass(frozen=True)
class StepBudget:
    """Limits of the time that a start spends on measuring steps."""

    cpu_seconds: float = 0.8
    gpu_seconds: float = 4.0
    """Longer than on a CPU: the best steps of a GPU are larger, and its start takes long anyway."""
    min_samples: int = 3
    """Sizes of step that are tried beyond the budget, unless one of them alone takes longer than the budget."""


def warm_up(
    pipeline: PackedPipeline[Any],
    info: ModelInfo,
    timer: RankTimer,
    model_bytes: int,
    run_variants: RunVariants | None = None,
    num_threads: int | None = None,
    budget: StepBudget = StepBudget(),
) -> Rates:
    """Run and time encodes, steps with more and more sequences, and a decode.

    All ranks of a replica call this together and use the same times, so they make the same choices.
    run_variants: compiles code, or has it compiled; None: nothing is compiled.
    num_threads: CPU threads to use; None: choose them.
    """
    ranks = timer.ranks
    state = pipeline.encode(warmup_request(info, "warm-up"))
    with _forward(pipeline, state, 4, ranks) as step:
        set_threads(timer, model_bytes, num_threads, step)
    if run_variants is not None:  # after the choice of threads, for which the code is compiled
        # A prompt so long that every rank has some of its tokens.
        prompt = " ".join([COMMON_PROMPT] * ranks.mesh.sequence.size)
        request = replace(warmup_request(info, prompt), num_inference_steps=VARIANT_STEPS)
        run_variants(pipeline, pipeline.encode(request), ranks)
    samples = measure_steps(pipeline, state, info, timer, budget)
    # The prompts differ, because the embedding of a repeated prompt is cached. The input picture is the same and is
    # encoded once: its cost is counted as a decode.
    requests = [warmup_request(info, f"warm-up number {i}") for i in range(3)]
    encode = timer.fastest([lambda r=r: pipeline.encode(r) for r in requests])  # type: ignore[misc]  # r
    num_prompt_tokens = info.count_prompt_tokens(requests[0].prompt)
    num_encoded_tokens = info.num_encoded_tokens(num_prompt_tokens + info.count_image_prompt_tokens(requests[0].images))
    decode = timer.fastest([lambda: pipeline.decode([state.request], [state.latents])] * 3)
    request = state.request
    num_decoded_tokens = info.num_decoded_tokens(request.height, request.width, request.num_frames)
    return Rates.from_times(samples, encode / num_encoded_tokens, decode / num_decoded_tokens, knee(samples))


def measure_steps(
    pipeline: PackedPipeline[Any], state: RequestState, info: ModelInfo, timer: RankTimer, budget: StepBudget
) -> list[Sample]:
    """Time the forward of 1, 2, 4, ... copies of `state`, as far as the budget and the memory allow."""
    budget_seconds = budget.gpu_seconds if timer.device.is_asynchronous else budget.cpu_seconds
    samples: list[Sample] = []
    spent = took = 0.0
    tokens = sum(state.sequence_lengths)
    for copies in (2**i for i in range(MAX_TOKENS.bit_length())):
        expected = 0.0 if len(samples) < budget.min_samples and took < budget_seconds else spent + 2 * took
        if samples and (expected > budget_seconds or copies * tokens > MAX_TOKENS or not _has_room(timer)):
            break
        start = time.perf_counter()
        try:
            with _forward(pipeline, state, copies, timer.ranks) as step:
                seconds = timer.fastest([step] * (REPEATS if pipeline.capturer is None else CAPTURED_REPEATS))
        except Exception as error:
            # PeerFailedError: if the other rank did not run out of memory, that rank ends the start.
            if samples and (is_out_of_memory(error) or isinstance(error, PeerFailedError)):
                timer.device.release_memory()
                break
            raise
        units = copies * sum(info.sequence_cost(n) for n in state.sequence_lengths)
        samples.append(Sample(copies * tokens, units, seconds))
        took = timer.ranks.agree(time.perf_counter() - start)
        spent += took
    return samples


def _has_room(timer: RankTimer) -> bool:
    """Whether a step twice as large as the largest so far may be tried.

    Ranks that could not go on after a lack of memory must each have free what that step will need.
    """
    if timer.ranks.survive_failures:
        return True
    device = timer.device
    lacks_memory = 2 * device.transient_memory_bytes() > device.free_memory_bytes()
    return timer.ranks.agree(float(lacks_memory)) == 0


@contextmanager
def _forward(
    pipeline: PackedPipeline[Any], state: RequestState, copies: int, ranks: Ranks
) -> Iterator[Callable[[], object]]:
    """Call that runs the forward of some copies of `state`; at its end the pipeline forgets the copies."""
    states = [replace(state) for _ in range(copies)]
    placement = balance({str(i): s.sequence_lengths for i, s in enumerate(states)}, ranks.mesh.cfg_size)
    groups = list(chain.from_iterable(placement.values()))
    try:
        yield lambda: ranks.attempt(lambda: pipeline.predict(states, groups))
    finally:
        for copy in states:
            pipeline.forget(copy)
