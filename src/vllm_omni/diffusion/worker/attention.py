"""Which attention backend a model runs with: the one that was asked for, or the fastest here."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_omni.diffusion.attention import BACKENDS, AttentionBackend, Setting, backend_class
from vllm_omni.diffusion.data import AttentionBackendName, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.packing import Offsets, cut
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.worker.device import Device
from vllm_omni.diffusion.worker.ranks import Ranks
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
    """What the backends are timed with: queries and keys of one rank."""

    setting: Setting
    heads: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    with_lse: bool
    """Whether keys travel round a ring, whose blocks are merged by their log-sum-exp."""

    @classmethod
    def of(cls, setting: Setting, info: ModelInfo, parallel: DiffusionParallelConfig) -> Task:
        """Two guidance branches of the model's default picture, capped."""
        defaults = info.default_sampling_params
        picture = min(info.num_image_tokens(defaults["height"], defaults["width"]), MAX_PICTURE_TOKENS)
        ring = parallel.ring_degree
        lengths = tuple(cut(info.num_sequence_tokens(text, picture), ring)[0] for text in TEXT_TOKENS)
        heads = cut(info.num_heads // parallel.tensor_parallel_size, parallel.ulysses_degree)[0]
        return cls(setting, heads, lengths, lengths, with_lse=ring > 1)

    def of_lengths(self, lengths: tuple[int, ...]) -> Task:
        return Task(self.setting, self.heads, lengths, lengths, self.with_lse)

    def prepare(self, backend: AttentionBackend) -> Callable[[], object]:
        """A call of `backend` on random numbers."""
        q, (k, v) = self._random(1, self.lengths_q)[0], self._random(2, self.lengths_k)
        offsets_q, offsets_k = (Offsets.of(n, self.setting.device) for n in (self.lengths_q, self.lengths_k))
        attend = backend.attend_with_lse if self.with_lse else backend.attend
        return lambda: attend(q, k, v, offsets_q, offsets_k)

    def _random(self, num: int, lengths: Sequence[int]) -> Tensor:
        shape = (num, sum(lengths), self.heads, self.setting.head_dim)
        return torch.randn(shape, dtype=self.setting.dtype, device=self.setting.device)


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
    config: OmniDiffusionConfig, info: ModelInfo, device: Device, dtype: torch.dtype, ranks: Ranks
) -> AttentionBackendName:
    """The name of the backend that all ranks of the replica take; they must all call this.

    Raises ConfigError when the one that was asked for does not run here.
    """
    setting = Setting(device.torch, device.capability, dtype, info.head_dim)
    task = Task.of(setting, info, config.parallel)
    classes = {name: backend_class(name) for name in BACKENDS}
    if config.attention_backend is not None:
        choice = check(config.attention_backend, classes, task, ranks)
    else:
        choice = find_fastest(classes, task, ranks, lambda run: median_seconds(run, device))
    if ranks.mesh.world.rank == 0:
        logger.info("%s", choice)
    return choice.name


def check(name: AttentionBackendName, classes: Classes, task: Task, ranks: Ranks) -> Choice:
    """That backend, which has run once. Raises ConfigError when it cannot."""
    refusals = _refusals(classes, task.setting, ranks)
    if name not in refusals and (reason := _try(classes[name], task)) is not None:
        refusals[name] = reason
    if name in refusals:
        accepted = ", ".join(other for other in classes if other not in refusals)
        raise ConfigError(
            f"--attention-backend takes {accepted} here, got {name}, which does not run: {name} {refusals[name]}"
        )
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
            measured = timing(task.prepare(classes[name]()))
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


def median_seconds(run: Callable[[], object], device: Device) -> float:
    """Of a few runs, until the device is done with each."""
    seconds = []
    for _ in range(WARM_UP_RUNS + TIMED_RUNS):
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP_RUNS:])


def _refusals(classes: Classes, setting: Setting, ranks: Ranks) -> dict[AttentionBackendName, str]:
    """By backend that does not run on all ranks, why."""
    reasons = [backend.why_not(setting) for backend in classes.values()]
    refused = ranks.unite([reason is not None for reason in reasons])
    return {name: reason or "does not run on another rank" for name, reason, no in zip(classes, reasons, refused) if no}


def _try(backend: type[AttentionBackend], task: Task) -> str | None:
    """Why it fails on a small task; None: it does not."""
    try:
        task.of_lengths(TRIAL_LENGTHS).prepare(backend())()
    except Exception as error:  # whatever a kernel raises
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
