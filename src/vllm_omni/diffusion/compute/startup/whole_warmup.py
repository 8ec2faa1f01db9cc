"""Warm-up of a whole pipeline: complete trial requests, which also prove that it can serve its defaults."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.device.failures import is_device_failure, is_out_of_memory
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Rates, Sample
from vllm_omni.diffusion.compute.startup.thread_choice import set_threads
from vllm_omni.diffusion.compute.startup.warmup_requests import default_request
from vllm_omni.diffusion.compute.step.pipeline import Pipeline, RequestState
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, error_line

logger = logging.getLogger(__name__)

SMALL_PICTURE_TOKENS = (64, 64, 256)
"""Most image tokens of each small trial picture; the first one is a warm-up."""


def warm_up_whole(
    pipeline: Pipeline[Any],
    info: WholeModelInfo,
    timer: RankTimer,
    model_bytes: int,
    num_threads: int | None = None,
) -> Rates:
    """Run and time small trial requests, or else requests of the model's default size.

    A failure at a small size is no fault: some pipelines accept only sizes near their own. A pipeline with a table of
    sizes (`WholePipeline.bins`) rounds every size to one of them, so it is tried at its default size alone.
    num_threads: CPU threads to use; None: choose them.
    Raises ConfigError with the reason of each failure when no trial succeeds.
    """
    info.count_prompt_tokens("")  # loads the tokenizer, which must not count as the time of an encode
    own_size = [default_request(info, None)] * 2
    small = [default_request(info, tokens) for tokens in SMALL_PICTURE_TOKENS]
    trials = [own_size] if info.pipeline.bins else [small, own_size]
    failures: list[str] = []
    for requests in trials:
        try:
            set_threads(timer, model_bytes, num_threads, partial(_run, pipeline, requests[0], timer))
            return _measure(pipeline, info, timer, requests)
        except Exception as error:  # diffusers' code on an unknown model may raise anything
            if is_out_of_memory(error):
                raise
            failures.append(error_line(error))
            if is_device_failure(error) or len(failures) == len(trials):
                reasons = "; before that, on a small one: ".join(dict.fromkeys(reversed(failures)))
                raise ConfigError(f"the {info.pipeline.class_name} fails on a default request: {reasons}") from error
            logger.info("a small trial request fails (%s); trying one of the model's own size", failures[-1])
    raise AssertionError("the last trial returns or raises")


def _measure(
    pipeline: Pipeline[Any], info: WholeModelInfo, timer: RankTimer, requests: Sequence[DiffusionRequest]
) -> Rates:
    """Rates from complete runs of the requests; the first run is a warm-up."""
    runs = [_run(pipeline, request, timer) for request in requests]
    samples = [
        Sample(_num_image_tokens(info, r), _step_units(info, r), step) for r, (_, step, _) in zip(requests, runs)
    ]
    last, (encode, _, decode) = requests[-1], runs[-1]
    return Rates.from_times(
        samples[1:],
        encode / info.count_prompt_tokens(last.prompt),
        decode / info.num_decoded_tokens(last.height, last.width, last.num_frames),
    )


def _step_units(info: WholeModelInfo, request: DiffusionRequest) -> float:
    """Units of one step. With guidance a second sequence is counted, without text."""
    num_image_tokens = _num_image_tokens(info, request)
    units = info.sequence_cost(num_image_tokens + info.count_prompt_tokens(request.prompt))
    return units + (info.sequence_cost(num_image_tokens) if request.has_guidance else 0)


def _num_image_tokens(info: WholeModelInfo, request: DiffusionRequest) -> int:
    return info.num_image_tokens(request.height, request.width, request.num_frames)


def _run(pipeline: Pipeline[Any], request: DiffusionRequest, timer: RankTimer) -> tuple[float, float, float]:
    """Seconds of the encode, of the fastest step and of the decode of `request`."""
    states: list[RequestState] = []
    encode = timer.fastest([lambda: states.append(pipeline.encode(request))])
    (state,) = states
    try:
        step = min(timer.fastest([lambda: pipeline.advance(state, ())]) for _ in range(request.num_inference_steps))
        decode = timer.fastest([lambda: pipeline.decode([request], [state.latents])])
    finally:
        pipeline.forget(state)
    return encode, step, decode
