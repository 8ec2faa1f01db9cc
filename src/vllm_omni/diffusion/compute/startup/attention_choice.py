"""Which attention backend a model runs with: the one that was asked for, or the fastest here."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from vllm_omni.diffusion.catalog.registry import ModelInfo
from vllm_omni.diffusion.compute.attention import BACKENDS, AttentionBackend, Setting, backend_class
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.kinds import Device
from vllm_omni.diffusion.compute.packing import Offsets, shard_lengths
from vllm_omni.diffusion.data import AttentionBackendName, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_PICTURE_TOKENS = 4096
TEXT_TOKENS = (64, 32)
"""Of the two guidance branches that are timed: lengths of a pack are seldom equal."""
TRIAL_LENGTHS = (16, 8)
WARM_UP_RUNS = 2
TIMED_RUNS = 5

Classes = Mapping[AttentionBackendName, type[AttentionBackend]]
Timing = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


@dataclass(frozen=True)
class Task:
    """What the backends are timed with: the queries, and as many keys, of one rank."""

    setting: Setting
    heads: int
    lengths: tuple[int, ...]
    with_lse: bool
    """Whether keys travel round a ring, whose blocks are merged by their log-sum-exp."""
    num_calls: int
    """By a request, all of the same lengths."""

    @classmethod
    def of(cls, setting: Setting, info: ModelInfo, parallel: DiffusionParallelConfig) -> Task:
        """Two guidance branches of the model's default picture, capped."""
        defaults = info.default_sampling_params
        picture = min(info.num_image_tokens(defaults["height"], defaults["width"]), MAX_PICTURE_TOKENS)
        ring = parallel.ring_degree
        lengths = tuple(shard_lengths(info.num_sequence_tokens(text, picture), ring)[0] for text in TEXT_TOKENS)
        heads = shard_lengths(info.num_heads // parallel.tensor_parallel_size, parallel.ulysses_degree)[0]
        num_calls = info.num_blocks * defaults["num_inference_steps"]
        return cls(setting, heads, lengths, ring > 1, num_calls)

    def prepare(self, backend: AttentionBackend) -> Callable[[], object]:
        """A call of `backend` on random numbers."""
        shape = (3, sum(self.lengths), self.heads, self.setting.head_dim)
        q, k, v = torch.randn(shape, dtype=self.setting.dtype, device=self.setting.device).unbind()
        offsets = Offsets.of(self.lengths, self.setting.device)
        attend = backend.attend_with_lse if self.with_lse else backend.attend
        return lambda: attend(q, k, v, offsets, offsets)


@dataclass(frozen=True)
class Choice:
    name: AttentionBackendName
    seconds: Mapping[AttentionBackendName, float] = field(default_factory=dict)
    """Of those that were timed."""
    refusals: Mapping[AttentionBackendName, str] = field(default_factory=dict)
    """Why the others do not run here."""

    def __str__(self) -> str:
        timed = [f"{name} {1000 * seconds:.3f} ms" for name, seconds in self.seconds.items()]
        refused = [f"{name} {reason}" for name, reason in self.refusals.items()]
        return f"attention backend: {self.name}" + (f" ({'; '.join([*timed, *refused])})" if timed or refused else "")


def choose_attention(
    config: OmniDiffusionConfig,
    info: ModelInfo,
    device: Device,
    dtype: torch.dtype,
    ranks: Ranks,
    first: AttentionBackendName | None = None,
) -> AttentionBackendName:
    """The name of the backend that all ranks of the replica take; they must all call this.

    first: the choice of the first start, which a restart takes over: another kernel rounds differently, and a replayed
    request must give the same pixels.
    Raises ConfigError when the one that was asked for, or chosen first, does not run here.
    """
    setting = Setting(device.torch, device.capability, dtype, info.head_dim)
    task = Task.of(setting, info, config.parallel)
    classes = {name: backend_class(name) for name in BACKENDS}
    timing = partial(elapsed, device=device)
    if config.attention_backend is not None:
        choice = check(config.attention_backend, classes, task, ranks, timing)
    elif first is not None:
        choice = keep(first, classes, task, ranks, timing)
    else:
        choice = find_fastest(classes, task, ranks, timing)
    if ranks.mesh.world.rank == 0:
        logger.info("%s", choice)
    return choice.name


def check(name: AttentionBackendName, classes: Classes, task: Task, ranks: Ranks, timing: Timing) -> Choice:
    """That backend, which has run once. Raises ConfigError when it cannot."""
    reason = _why_not(name, classes, task, ranks, timing)
    if reason is not None:
        # The others are asked only now: an answer may take an import of seconds.
        others = [other for other in classes if other != name and classes[other].why_not(task.setting) is None]
        raise ConfigError(
            f"--attention-backend takes {', '.join(others)} here, got {name}, which does not run: {name} {reason}"
        )
    return Choice(name)


def keep(name: AttentionBackendName, classes: Classes, task: Task, ranks: Ranks, timing: Timing) -> Choice:
    """The choice of the first start, which has run once and is not timed. Raises ConfigError when it cannot run."""
    reason = _why_not(name, classes, task, ranks, timing)
    if reason is not None:
        raise ConfigError(f"the attention backend {name}, chosen at the first start, does not run any more: {reason}")
    return Choice(name)


def find_fastest(classes: Classes, task: Task, ranks: Ranks, timing: Timing) -> Choice:
    """Of the backends that run on all ranks, the one whose slowest rank is fastest. A lone one is not timed."""
    refusals = _refusals(classes, task.setting, ranks)
    candidates = [name for name in classes if name not in refusals]
    if len(candidates) == 1:
        return Choice(candidates[0])
    seconds = {}
    for name in candidates:
        try:
            measured = measure(classes[name](), task, timing)
        except Exception as error:
            # Whatever a kernel raises, it is this kernel that does not run; all ranks must hear of it.
            refusals[name], measured = _reason(error), math.inf
        seconds[name] = ranks.agree(measured)
    running = {name: value for name, value in seconds.items() if value < math.inf}
    for name in seconds.keys() - running.keys():
        refusals.setdefault(name, "fails on another rank")
    if not running:
        raise ConfigError(f"no attention backend runs here: {'; '.join(f'{n} {r}' for n, r in refusals.items())}")
    return Choice(min(running, key=lambda name: running[name]), running, refusals)


def measure(backend: AttentionBackend, task: Task, timing: Timing) -> float:
    """Seconds of one of the calls that a request makes: the median of a few, and its share of what the first call with
    new lengths takes longer. A library that plans for each shape may be fast only after that."""
    run = task.prepare(backend)
    steady = statistics.median([timing(run) for _ in range(WARM_UP_RUNS + TIMED_RUNS)][WARM_UP_RUNS:])
    first = timing(replace(task, lengths=tuple(n + 1 for n in task.lengths)).prepare(backend))
    return steady + max(0.0, first - steady) / task.num_calls


def elapsed(run: Callable[[], object], device: Device) -> float:
    """Until the device is done with it."""
    device.synchronize()
    start = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - start


def _why_not(name: AttentionBackendName, classes: Classes, task: Task, ranks: Ranks, timing: Timing) -> str | None:
    """Why a backend does not run on all ranks, or not on a small task; None: it does."""
    backend = classes[name]
    return _refusals({name: backend}, task.setting, ranks).get(name) or _try(backend, task, timing)


def _refusals(classes: Classes, setting: Setting, ranks: Ranks) -> dict[AttentionBackendName, str]:
    """By backend that does not run on all ranks, why."""
    reasons = [backend.why_not(setting) for backend in classes.values()]
    refused = ranks.unite([reason is not None for reason in reasons])
    return {name: reason or "does not run on another rank" for name, reason, no in zip(classes, reasons, refused) if no}


def _try(backend: type[AttentionBackend], task: Task, timing: Timing) -> str | None:
    """Why it fails on a small task; None: it does not."""
    try:
        timing(replace(task, lengths=TRIAL_LENGTHS).prepare(backend()))
    except Exception as error:  # whatever a kernel raises
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
