"""Compilation before the first request, in every variant that a step may need."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_omni.diffusion.compute.coordination.ranks import PeerFailedError, Ranks, RanksLostError
from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, RequestState
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)


def run_variants(pipeline: PackedPipeline[Any], state: RequestState, ranks: Ranks) -> None:
    """Run a step with one sequence, one with several, and one with several at different timesteps.

    Every rank group computes all three, with one transformer: others have the same shapes and share the compiled code.
    state: a new state of a request of more steps than there are transformers.
    """
    steps = defaultdict(list)
    for step in range(state.request.num_inference_steps):
        at = replace(state, step=step)
        steps[pipeline.transformer_index(at)].append(at)
    first, later, *_ = max(steps.values(), key=len)
    for kind in ([first], [first, first], [first, later]):
        _run(pipeline, kind, ranks)


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


def _run(pipeline: PackedPipeline[Any], kind: Sequence[RequestState], ranks: Ranks) -> None:
    placed = [(replace(state), group) for state in kind for group in range(ranks.mesh.cfg_size)]
    states = [state for state, _ in placed]
    groups = [group for state, group in placed for _ in state.sequence_lengths]
    try:
        ranks.attempt(lambda: pipeline.predict(states, groups))
    finally:
        for state in states:
            pipeline.forget(state)
