"""Choice of the attention backend: the requested one, that of the first start, or the fastest on this device."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.attention import BACKENDS, AttentionBackend, Setting, backend_class
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.packing import Offsets, shard_lengths
from vllm_omni.diffusion.data import AttentionBackendName, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_PICTURE_TOKENS, MAX_VIDEO_TOKENS = 4096, 16384
"""Most image tokens of a timed sequence. Which kernel is fastest depends on the length, and hardly any more beyond."""
TEXT_TOKENS = (64, 32)
"""Text tokens of the two timed sequences, which differ as in most packs."""
TRIAL_LENGTHS = (16, 8)
"""Tokens of the two sequences of a call that only shows whether a backend runs."""
WARM_UP_RUNS = 2
TIMED_RUNS = 5


@dataclass(frozen=True)
class AttentionTask:
    """Attention call that backends are timed with: the queries of one rank, and as many keys."""

    setting: Setting
    heads: int
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    with_lse: bool
    """Whether the call returns the log-sum-exp, by which a ring merges the results of its blocks of keys."""
    num_calls: int
    """Calls of one request, all with the same lengths."""

    @classmethod
    def of(cls, setting: Setting, info: PackedModelInfo, parallel: DiffusionParallelConfig) -> AttentionTask:
        """Task of two guidance branches of the model's default picture or video, or of a smaller one."""
        defaults = info.default_sampling_params
        num_frames = defaults.get("num_frames", 1)
        most = MAX_PICTURE_TOKENS if num_frames == 1 else MAX_VIDEO_TOKENS
        picture = min(info.num_image_tokens(defaults["height"], defaults["width"], num_frames), most)
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
class AttentionChoice:
    """The chosen backend, with the reasons for the choice."""

    name: AttentionBackendName
    seconds: Mapping[AttentionBackendName, float] = field(default_factory=dict)
    """Seconds of a call, for each timed backend."""
    refusals: Mapping[AttentionBackendName, str] = field(default_factory=dict)
    """Why each of the other backends does not run here."""

    def __str__(self) -> str:
        timed = [f"{name} {1000 * seconds:.3f} ms" for name, seconds in self.seconds.items()]
        refused = [f"{name} {reason}" for name, reason in self.refusals.items()]
        return f"attention backend: {self.name}" + (f" ({'; '.join([*timed, *refused])})" if timed or refused else "")


def choose_attention(
    config: OmniDiffusionConfig,
    info: PackedModelInfo,
    device: Device,
    dtype: torch.dtype,
    ranks: Ranks,
    first: AttentionBackendName | None = None,
) -> AttentionBackendName:
    """Name of the backend for all ranks of the replica, which call this together.

    first: the choice of the first start. A restart keeps it, because another kernel rounds differently and a replayed
    request must give the same pixels.
    Raises ConfigError when the requested backend, or the first choice, does not run here.
    """
    task = AttentionTask.of(Setting(device.torch, device.capability, dtype, info.head_dim), info, config.parallel)
    trial = BackendTrial({name: backend_class(name) for name in BACKENDS}, task, ranks, device.elapsed)
    if config.attention_backend is not None:
        choice = trial.requested(config.attention_backend)
    elif first is not None:
        choice = trial.kept(first)
    else:
        choice = trial.fastest()
    if ranks.mesh.world.rank == 0:
        logger.info("%s", choice)
    return choice.name


@dataclass(frozen=True)
class BackendTrial:
    """Trial of attention backends on all ranks of a replica, which make the same calls together."""

    classes: Mapping[AttentionBackendName, type[AttentionBackend]]
    task: AttentionTask
    ranks: Ranks
    elapsed: Callable[[Callable[[], object]], float]
    """Seconds of a call."""

    def requested(self, name: AttentionBackendName) -> AttentionChoice:
        """The requested backend, after a trial call. Raises ConfigError when it does not run."""
        if (reason := self._failure(name)) is not None:
            # Other backends are asked only now, because the answer may take an import of seconds.
            backends = self.classes.items()
            others = [n for n, backend in backends if n != name and backend.why_not(self.task.setting) is None]
            raise ConfigError(
                f"--attention-backend takes {', '.join(others)} here, got {name}, which does not run: {name} {reason}"
            )
        return AttentionChoice(name)

    def kept(self, name: AttentionBackendName) -> AttentionChoice:
        """The choice of the first start, after a trial call. Raises ConfigError when it does not run any more."""
        if (reason := self._failure(name)) is not None:
            raise ConfigError(
                f"the attention backend {name}, chosen at the first start, does not run any more: {reason}"
            )
        return AttentionChoice(name)

    def fastest(self) -> AttentionChoice:
        """Backend that is fastest on its slowest rank; a lone one is not timed. Raises ConfigError without any."""
        refusals = self._refusals(self.classes)
        candidates = [name for name in self.classes if name not in refusals]
        if len(candidates) == 1:
            return AttentionChoice(candidates[0])
        measured, failures = measure({name: self.classes[name] for name in candidates}, self.task, self.elapsed)
        refusals |= failures
        # The other ranks learn of a failure by the infinite time.
        seconds = {name: self.ranks.agree(measured.get(name, math.inf)) for name in candidates}
        running = {name: value for name, value in seconds.items() if value < math.inf}
        for name in seconds.keys() - running.keys():
            refusals.setdefault(name, "fails on another rank")
        if not running:
            raise ConfigError(f"no attention backend runs here: {'; '.join(f'{n} {r}' for n, r in refusals.items())}")
        return AttentionChoice(min(running, key=lambda name: running[name]), running, refusals)

    def _failure(self, name: AttentionBackendName) -> str | None:
        """Why a backend does not run on all ranks, or fails at a trial call; None: it runs."""
        if reason := self._refusals([name]).get(name):
            return reason
        try:
            self.elapsed(replace(self.task, lengths=TRIAL_LENGTHS).prepare(self.classes[name]()))
        except Exception as error:  # a kernel may raise anything
            return _reason(error)
        return None

    def _refusals(self, names: Iterable[AttentionBackendName]) -> dict[AttentionBackendName, str]:
        """Why each backend that does not run on all ranks does not; the others have no entry."""
        reasons = {name: self.classes[name].why_not(self.task.setting) for name in names}
        refused = self.ranks.unite([reason is not None for reason in reasons.values()])
        return {n: reason or "does not run on another rank" for (n, reason), no in zip(reasons.items(), refused) if no}


def measure(
    classes: Mapping[AttentionBackendName, Callable[[], AttentionBackend]],
    task: AttentionTask,
    elapsed: Callable[[Callable[[], object]], float],
) -> tuple[dict[AttentionBackendName, float], dict[AttentionBackendName, str]]:
    """Seconds of a call of each backend that runs, and the reasons of the others.

    Seconds are the median, plus a call's part of the first call's extra time for new lengths. The backends take turns:
    a GPU is faster after a rest, so that the one timed first would win over faster ones.
    """
    backends: dict[AttentionBackendName, AttentionBackend] = {}
    runs: dict[AttentionBackendName, Callable[[], object]] = {}
    times: dict[AttentionBackendName, list[float]] = {name: [] for name in classes}
    failures: dict[AttentionBackendName, str] = {}
    longer = replace(task, lengths=tuple(n + 1 for n in task.lengths))
    for turn in range(WARM_UP_RUNS + TIMED_RUNS + 1):
        for name in [name for name in classes if name not in failures]:
            try:
                if turn == 0:
                    backends[name] = classes[name]()
                    runs[name] = task.prepare(backends[name])
                elif turn == WARM_UP_RUNS + TIMED_RUNS:
                    runs[name] = longer.prepare(backends[name])
                times[name].append(elapsed(runs[name]))
            except Exception as error:  # a kernel may raise anything
                failures[name] = _reason(error)
    seconds = {}
    for name in [name for name in classes if name not in failures]:
        *same, first = times[name]
        steady = statistics.median(same[WARM_UP_RUNS:])
        seconds[name] = steady + max(0.0, first - steady) / task.num_calls
    return seconds, failures


def _reason(error: Exception) -> str:
    return f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
