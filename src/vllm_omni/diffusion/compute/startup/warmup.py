"""Measure what a model costs on this device: the rates that the scheduler plans with."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from vllm_omni.diffusion.catalog.registry import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import PeerFailedError, Ranks
from vllm_omni.diffusion.compute.device.kinds import Device, is_device_failure, is_out_of_memory
from vllm_omni.diffusion.compute.step.pipeline import BasePipeline, RequestState
from vllm_omni.diffusion.messages.placement import balance
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, in_one_line
from vllm_omni.inputs.images import InputImage

logger = logging.getLogger(__name__)

BUDGET_SECONDS, DEVICE_BUDGET_SECONDS = 0.8, 4.0
"""Larger batches are tried while all tries together are expected to take less; of a device beside the host, whose best
batches are larger and whose start takes long anyway."""
REPEATS, CAPTURED_REPEATS = 3, 4
"""Timed runs per step; one more with CUDA graphs, because capture happens on run 2."""
REPEAT_SECONDS = 0.3
"""Runs that take longer are timed once only."""
MIN_SAMPLES = 3
"""Sizes tried whatever they take, unless one alone takes longer than the budget."""
SMALL_MODEL_BYTES = 2**30
"""The operations of a larger model are worth all threads, and trying fewer would take long."""
THREADS_GAIN = 1.25
"""Doubling the threads must speed a step up this much. Threads that wait for one another cost a small model more
than they give, and many times more on a machine that is shared."""
MAX_TOKENS = 2**15
MAX_PICTURE_TOKENS = 256
WHOLE_PICTURE_TOKENS = (64, 64, 256)
"""Most image tokens of each small picture that a whole pipeline makes; the time of the first one is not counted."""
WHOLE_PROMPT = "a photo of a red apple on a wooden table, in the style of an old master"
"""Prompt of a common length: most pipelines take as long for any prompt."""
MIN_BATCH_TOKENS = 256
"""However noisy the measurement: this many tokens are cheap enough on any device to share a step."""
KNEE = 1.18
"""A batch is large enough when a unit of work costs at most this times what it costs in the best batch."""


RunVariants = Callable[[BasePipeline[Any], RequestState, Ranks], object]
"""Runs, from a state of two steps, every kind of step for which code is compiled."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of the model on this device, with the units of the fields of `WorkerReady`."""

    seconds_per_unit: float
    step_overhead_seconds: float
    encode_units_per_token: float
    decode_units_per_token: float
    max_batch_tokens: int


@dataclass(frozen=True)
class Sample:
    """One size of step: tokens, units of `RequestCost`, seconds."""

    tokens: int
    units: float
    seconds: float


@dataclass(frozen=True)
class Timer:
    """Wall-clock seconds on which all ranks agree: the slowest rank's."""

    device: Device
    ranks: Ranks

    def least(self, runs: Sequence[Callable[[], object]]) -> float:
        """Seconds of the fastest run. The first run warms up; after a slow run the others are left out."""
        least = math.inf
        for run in runs:
            self.device.synchronize()
            start = time.perf_counter()
            run()
            self.device.synchronize()
            least = min(least, self.ranks.agree(time.perf_counter() - start))
            if least > REPEAT_SECONDS:
                break
        return least

    def mean(self, run: Callable[[], object]) -> float:
        """Mean seconds of a few runs after a first one: threads stall now and then, which the fastest run hides."""
        times = [self.least([run]) for _ in range(2)]
        while sum(times) < REPEAT_SECONDS and len(times) < 8:
            times.append(self.least([run]))
        return sum(times[1:]) / len(times[1:])


def warm_up(
    pipeline: BasePipeline[Any],
    info: ModelInfo,
    device: Device,
    model_bytes: int,
    ranks: Ranks,
    run_variants: RunVariants | None = None,
    num_threads: int | None = None,
) -> Rates:
    """Choose the threads of a small model; have code compiled; encode prompts, step with ever more sequences, decode a
    picture.

    All ranks of a replica do it together and agree on every time, so that they go on alike.
    num_threads: taken instead of a choice.
    """
    timer = Timer(device, ranks)
    state = pipeline.encode(_request(info, "warm-up", "warm-up"))
    if num_threads is not None:
        device.set_num_threads(num_threads)
    elif model_bytes <= SMALL_MODEL_BYTES and ranks.size == 1:
        with _forward(pipeline, state, 4, ranks) as step:
            choose_num_threads(device, timer, step)
    if run_variants is not None:  # for the threads that were chosen
        # So much text that every rank has some of it.
        prompt = " ".join([WHOLE_PROMPT] * ranks.mesh.sequence.size)
        run_variants(pipeline, pipeline.encode(_request(info, "warm-up", prompt)), ranks)
    samples = measure_steps(pipeline, state, info, timer)
    seconds_per_unit, overhead = fit_line(samples)
    # Prompts differ, for the embedding of one seen before is not computed again. Their input picture is the same, and
    # is not encoded again: that is priced as a decode.
    requests = [_request(info, f"warm-up number {i}", f"warm-up number {i}") for i in range(3)]
    encode = timer.least([lambda r=r: pipeline.encode(r) for r in requests])  # type: ignore[misc]  # r
    num_prompt_tokens = info.count_prompt_tokens(requests[0].prompt) + info.count_image_prompt_tokens(
        requests[0].images
    )
    decode = timer.least([lambda: pipeline.decode([state.request], [state.latents])] * 3)
    return Rates(
        seconds_per_unit=seconds_per_unit,
        step_overhead_seconds=overhead,
        encode_units_per_token=encode / num_prompt_tokens / seconds_per_unit,
        decode_units_per_token=decode / _num_image_tokens(info, state.request) / seconds_per_unit,
        max_batch_tokens=max(MIN_BATCH_TOKENS, knee(samples)),
    )


def warm_up_whole(
    pipeline: BasePipeline[Any], info: ModelInfo, device: Device, model_bytes: int, num_threads: int | None = None
) -> Rates:
    """Measure a whole pipeline: make small pictures with the default guidance, or else one of the model's own size.

    Some pipelines accept only sizes near their own, or round others: a failure at a small size says nothing about them.
    One with a table of sizes makes no small picture, whatever it is asked for.
    num_threads: taken instead of a choice.
    Raises ConfigError, with the reason of each failure, for a pipeline that makes none of these pictures.
    """
    assert info.whole is not None
    timer = Timer(device, Ranks())
    own = [_whole_request(info, None)] * 2
    small = [_whole_request(info, tokens) for tokens in WHOLE_PICTURE_TOKENS]
    trials = [own] if info.whole.bins else [small, own]
    failures: list[str] = []
    for requests in trials:
        try:
            if num_threads is not None:
                device.set_num_threads(num_threads)
            elif model_bytes <= SMALL_MODEL_BYTES:
                choose_num_threads(device, timer, partial(_run_whole, pipeline, requests[0], timer))
            return _whole_rates(pipeline, info, timer, requests)
        except Exception as error:  # diffusers' code on somebody's model: anything
            if is_out_of_memory(error):
                raise
            failures.append(in_one_line(error))
            if is_device_failure(error) or len(failures) == len(trials):
                reasons = "; before that, on a small one: ".join(dict.fromkeys(reversed(failures)))
                raise ConfigError(f"the {info.whole.class_name} fails on a default request: {reasons}") from error
            logger.info("a small trial request fails (%s); trying one of the model's own size", failures[-1])
    raise AssertionError("the last trial returns or raises")


def _whole_rates(
    pipeline: BasePipeline[Any], info: ModelInfo, timer: Timer, requests: Sequence[DiffusionRequest]
) -> Rates:
    """Rates from complete runs of the requests; the time of the first is not counted."""
    runs = [_run_whole(pipeline, request, timer) for request in requests]
    samples = [Sample(_num_image_tokens(info, r), _whole_units(info, r), run[1]) for r, run in zip(requests, runs)]
    seconds_per_unit, overhead = fit_line(samples[1:])
    encode, _, decode = runs[-1]
    return Rates(
        seconds_per_unit=seconds_per_unit,
        step_overhead_seconds=overhead,
        encode_units_per_token=encode / info.count_prompt_tokens(requests[-1].prompt) / seconds_per_unit,
        decode_units_per_token=decode / _num_image_tokens(info, requests[-1]) / seconds_per_unit,
        max_batch_tokens=MIN_BATCH_TOKENS,
    )


def _whole_units(info: ModelInfo, request: DiffusionRequest) -> float:
    """Units of one step: a second sequence, without text, where the default request uses guidance."""
    num_image_tokens = _num_image_tokens(info, request)
    units = info.sequence_cost(num_image_tokens + info.count_prompt_tokens(request.prompt))
    return units + (info.sequence_cost(num_image_tokens) if request.has_guidance else 0)


def _num_image_tokens(info: ModelInfo, request: DiffusionRequest) -> int:
    return info.num_image_tokens(request.height, request.width, request.num_frames)


def _run_whole(pipeline: BasePipeline[Any], request: DiffusionRequest, timer: Timer) -> tuple[float, float, float]:
    """Seconds of the encoding, of the fastest step and of the decode of `request`."""
    states: list[RequestState] = []
    encode = timer.least([lambda: states.append(pipeline.encode(request))])
    (state,) = states
    try:
        step = min(
            timer.least([lambda: pipeline.advance(state, state.latents)]) for _ in range(request.num_inference_steps)
        )
        decode = timer.least([lambda: pipeline.decode([request], [state.latents])])
    finally:
        pipeline.forget(state)
    return encode, step, decode


def choose_num_threads(device: Device, timer: Timer, step: Callable[[], object]) -> None:
    """Double the threads from one, up to those that the process has, for as long as `step` gains from it.

    When `step` raises, the threads are those from before the call.
    """
    most, chosen, best = device.num_threads, 1, math.inf
    if most == 1:
        return
    count = 1
    try:
        while count <= most:
            device.set_num_threads(count)
            seconds = timer.mean(step)
            if seconds * THREADS_GAIN > best:
                break
            chosen, best, count = count, seconds, 2 * count
    except BaseException:  # whatever ends the choice, the process must not stay with one thread
        device.set_num_threads(most)
        raise
    device.set_num_threads(chosen)


def measure_steps(pipeline: BasePipeline[Any], state: RequestState, info: ModelInfo, timer: Timer) -> list[Sample]:
    """Time the forward of 1, 2, 4, ... copies of `state`, as far as the budget and the memory reach."""
    budget = DEVICE_BUDGET_SECONDS if timer.device.works_ahead else BUDGET_SECONDS
    samples: list[Sample] = []
    spent = took = 0.0
    tokens = sum(state.sequence_lengths)
    for copies in (2**i for i in range(MAX_TOKENS.bit_length())):
        expected = 0.0 if len(samples) < MIN_SAMPLES and took < budget else spent + 2 * took
        if samples and (expected > budget or copies * tokens > MAX_TOKENS or not _has_room(timer)):
            break
        start = time.perf_counter()
        try:
            with _forward(pipeline, state, copies, timer.ranks) as step:
                seconds = timer.least([step] * (REPEATS if pipeline.capturer is None else CAPTURED_REPEATS))
        except Exception as error:
            # Where it was another rank's memory that ran out, that rank knows; where it was not, it ends the start.
            if samples and (is_out_of_memory(error) or isinstance(error, PeerFailedError)):
                timer.device.release_memory()
                break
            raise
        units = copies * sum(info.sequence_cost(n) for n in state.sequence_lengths)
        samples.append(Sample(copies * tokens, units, seconds))
        took = timer.ranks.agree(time.perf_counter() - start)
        spent += took
    return samples


def _has_room(timer: Timer) -> bool:
    """Whether a batch twice as large as any before it may be tried.

    Ranks that would not survive a lack of memory must each have as much as it takes.
    """
    if timer.ranks.survive_failures:
        return True
    device = timer.device
    lacks_memory = 2 * device.passing_memory_bytes() > device.free_memory_bytes()
    return timer.ranks.agree(float(lacks_memory)) == 0


@contextmanager
def _forward(
    pipeline: BasePipeline[Any], state: RequestState, copies: int, ranks: Ranks
) -> Iterator[Callable[[], object]]:
    """The forward of some copies of `state`, which the pipeline forgets in the end."""
    states = [replace(state) for _ in range(copies)]
    placement = balance({str(i): s.sequence_lengths for i, s in enumerate(states)}, ranks.mesh.cfg_size)
    groups = list(chain.from_iterable(placement.values()))
    try:
        yield lambda: ranks.attempt(lambda: pipeline.predict(states, groups))
    finally:
        for copy in states:
            pipeline.forget(copy)


def fit_line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Seconds per unit and seconds per step, by least squares of the relative error; both at least 0."""
    weights = [1 / sample.seconds**2 for sample in samples]
    total = sum(weights)
    mean_units = sum(w * s.units for w, s in zip(weights, samples)) / total
    mean_seconds = sum(w * s.seconds for w, s in zip(weights, samples)) / total
    spread = sum(w * (s.units - mean_units) ** 2 for w, s in zip(weights, samples))
    slope = (
        sum(w * (s.units - mean_units) * (s.seconds - mean_seconds) for w, s in zip(weights, samples)) / spread
        if spread > 0
        else 0.0
    )
    overhead = mean_seconds - slope * mean_units
    if slope <= 0 or overhead < 0:
        return samples[-1].seconds / samples[-1].units, 0.0
    return slope, overhead


def knee(samples: Sequence[Sample]) -> int:
    """Tokens of the smallest batch whose time per unit is near the best."""
    best = min(s.seconds / s.units for s in samples)
    return next(s.tokens for s in samples if s.seconds / s.units <= KNEE * best)


def _request(info: ModelInfo, request_id: str, prompt: str, most_tokens: int = MAX_PICTURE_TOKENS) -> DiffusionRequest:
    """A square picture, the default one or smaller; for an editing model of a black one of the same size.

    A video has two latent frames.
    """
    defaults = info.default_sampling_params
    largest = math.isqrt(most_tokens) * info.pixels_per_token
    side = min(defaults["height"], defaults["width"], largest)
    num_frames = min(defaults.get("num_frames", 1), 1 + info.latent_frames)
    black = np.zeros((side, side, 3), np.uint8)
    return DiffusionRequest(
        request_id=request_id,
        prompt=prompt,
        height=side,
        width=side,
        num_inference_steps=2,
        guidance_scale=1.0,
        seed=0,
        max_sequence_length=defaults.get("max_sequence_length", info.max_prompt_tokens),  # some models fill prompts up
        images=() if info.image_input is None or not info.image_input.min_images else (InputImage.of(black, black),),
        strength=1.0 if "strength" in info.parameters else None,  # all steps, so that they can be timed
        num_frames=num_frames,
    )


def _whole_request(info: ModelInfo, most_tokens: int | None) -> DiffusionRequest:
    """A default request of two steps: small (at most `most_tokens`), or (None) of the model's own size and frames.

    Guidance and the negative prompt are the model's own, because that is what most requests will use.
    """
    defaults = info.default_sampling_params
    scale, negative = info.guidance.resolved(defaults.get(info.guidance.parameter), defaults.get("negative_prompt"))
    request = replace(
        _request(info, "warm-up", WHOLE_PROMPT, most_tokens or MAX_PICTURE_TOKENS),
        negative_prompt=negative,
        guidance_scale=defaults.get("guidance_scale"),
        true_cfg_scale=scale,
    )
    if most_tokens is not None:
        return request
    height, width, num_frames = defaults["height"], defaults["width"], defaults.get("num_frames", 1)
    black = np.zeros((height, width, 3), np.uint8)
    return replace(
        request,
        height=height,
        width=width,
        num_frames=num_frames,
        images=(InputImage.of(black, black),) if request.images else (),
    )
