"""Warm-up of a packed family: choose threads, have code compiled, measure rates."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks, RanksLostError
from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.distributed.groups import PeerFailedError
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer, set_threads
from vllm_omni.diffusion.compute.startup.rates import Rates, Sample, knee
from vllm_omni.diffusion.compute.startup.streaming import beside_copies, seconds_of_copies
from vllm_omni.diffusion.compute.startup.warmup_requests import COMMON_PROMPT, warmup_request
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, RequestState
from vllm_omni.diffusion.messages.placement import balance
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)

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
    """More than on a CPU: the best steps of a GPU are larger, and its start takes long anyway."""
    min_samples: int = 3
    """Step sizes that are measured even if together they exceed the budget, unless one of them alone does."""


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
    with _copies(pipeline, state, 4, ranks) as step:
        set_threads(timer, model_bytes, num_threads, step)
    if run_variants is not None:  # after the choice of threads, for which the code is compiled
        # A prompt so long that every rank has some of its tokens.
        prompt = " ".join([COMMON_PROMPT] * ranks.mesh.sequence.size)
        request = replace(warmup_request(info, prompt), num_inference_steps=VARIANT_STEPS)
        run_variants(pipeline, pipeline.encode(request), ranks)
    offload, copy_seconds = pipeline.layer_offload, 0.0
    with nullcontext() if offload is None else offload.paused():  # else the copies would hide what a step computes
        samples = measure_steps(pipeline, state, info, timer, budget)
    if offload is not None:
        copy_seconds = seconds_of_copies(offload, timer)
    # The prompts differ, because the embedding of a repeated prompt is cached. The input picture is the same and is
    # encoded once: its cost is counted as a decode.
    requests = [warmup_request(info, f"warm-up number {i}") for i in range(3)]
    encode = timer.fastest([lambda r=r: pipeline.encode(r) for r in requests])  # type: ignore[misc]  # r is bound
    num_prompt_tokens = info.count_prompt_tokens(requests[0].prompt)
    num_encoded_tokens = info.num_encoded_tokens(num_prompt_tokens + info.count_image_prompt_tokens(requests[0].images))
    decode = timer.fastest([lambda: pipeline.decode([state.request], [state.latents])] * 3)
    request = state.request
    num_decoded_tokens = info.num_decoded_tokens(request.height, request.width, request.num_frames)
    max_batch_tokens = knee(beside_copies(samples, copy_seconds))
    return Rates.from_times(
        samples, encode / num_encoded_tokens, decode / num_decoded_tokens, max_batch_tokens, copy_seconds
    )


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
            with _copies(pipeline, state, copies, timer.ranks) as step:
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
    """Whether a step of twice the size may be tried: ranks that cannot go on after an error need memory for it."""
    if timer.ranks.survive_failures:
        return True
    device = timer.device
    lacks_memory = 2 * device.transient_memory_bytes() > device.free_memory_bytes()
    return timer.ranks.agree(float(lacks_memory)) == 0


def run_variants(pipeline: PackedPipeline[Any], state: RequestState, ranks: Ranks) -> None:
    """Run a step with one sequence, one with several, and one with several at different timesteps.

    Every rank group computes all three, with one transformer: others have the same shapes and share the compiled code.
    state: a new state of a request of more steps than there are transformers.
    """
    steps = defaultdict(list)
    for number in range(state.request.num_inference_steps):
        at = replace(state, step=number)
        steps[pipeline.transformer_index(at)].append(at)
    first, later, *_ = max(steps.values(), key=len)
    for variant in ([first], [first, first], [first, later]):
        placed = [(replace(state), group) for state in variant for group in range(ranks.mesh.cfg_size)]
        groups = [group for state, group in placed for _ in state.sequence_lengths]
        with _forward(pipeline, [state for state, _ in placed], groups, ranks) as step:
            step()


def compile_variants(pipeline: PackedPipeline[Any], state: RequestState, ranks: Ranks) -> None:
    """Compile the transformer's blocks by `run_variants`. Raises ConfigError when they do not compile."""
    start = time.perf_counter()
    compiled = pipeline.compile_blocks()
    try:
        run_variants(pipeline, state, ranks)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (PeerFailedError, RanksLostError)):
            raise
        logger.warning("the first compiled step failed", exc_info=True)
        # The first line may only name the compiler backend that raised.
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:2]])
        raise ConfigError(
            f"the transformer's blocks cannot be compiled here: {reason}; --enforce-eager serves without compiling"
        ) from error
    compiled.end_warm_up()
    logger.info("compiled %s in %.1f s; all else runs eagerly", compiled, time.perf_counter() - start)


def _copies(
    pipeline: PackedPipeline[Any], state: RequestState, count: int, ranks: Ranks
) -> AbstractContextManager[Callable[[], object]]:
    """`_forward` of copies of `state`, placed as the scheduler would."""
    states = [replace(state) for _ in range(count)]
    placement = balance({str(i): s.sequence_lengths for i, s in enumerate(states)}, ranks.mesh.cfg_size)
    return _forward(pipeline, states, list(chain.from_iterable(placement.values())), ranks)


@contextmanager
def _forward(
    pipeline: PackedPipeline[Any], states: Sequence[RequestState], groups: Sequence[int], ranks: Ranks
) -> Iterator[Callable[[], object]]:
    """Call that runs the forward of `states`; at the end the pipeline forgets them. groups: see `Pipeline.predict`."""
    try:
        yield lambda: ranks.attempt(lambda: pipeline.predict(states, groups))
    finally:
        for state in states:
            pipeline.forget(state)
