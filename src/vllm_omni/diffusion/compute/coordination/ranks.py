"""The ranks of a replica: common decisions, and recovery after an error on one of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.distributed.groups import Group, GroupBrokenError, PeerFailedError
from vllm_omni.diffusion.compute.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh, World
from vllm_omni.diffusion.compute.step.cuda_graphs import Capturer
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

logger = logging.getLogger(__name__)

Output = TypeVar("Output")

_INTERRUPTED, _FAILED = 0, 1
_CAPTURED, _NO_MEMORY, _NOT_CAPTURED = 0.0, 1.0, 2.0
"""Outcomes of a capture; the largest one on any rank counts."""


class RanksLostError(Exception):
    """The ranks cannot go on together; all workers of the replica must start again."""


def connect(
    parallel: DiffusionParallelConfig, rank_info: RankInfo, device: Device, shards_weights: bool = False
) -> World:
    """Connect to the other ranks of the replica, which all call this together. shards_weights: see `Mesh.weights`."""
    store = TCPStore(
        "127.0.0.1",
        rank_info.store_port,
        is_master=rank_info.store_fd is not None,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=rank_info.store_fd,
    )
    return World(parallel, rank_info.rank, device.torch, store, shards_weights)


class Ranks:
    """The ranks of a replica, from the view of one; all make the same calls in order. `world` None: one rank."""

    def __init__(self, world: World | None = None) -> None:
        self.mesh = Mesh.single() if world is None else world.mesh
        self.world = world
        self.num_attempts = 0
        """Calls of `attempt` so far, equal on all ranks."""

    @property
    def size(self) -> int:
        return self.mesh.world.size

    def unite(self, votes: Sequence[bool]) -> list[bool]:
        """Whether any rank votes True, for each vote. All ranks give the same number of votes."""
        if self.size == 1:
            return list(votes)
        return self.mesh.control.all_max(torch.tensor(votes, dtype=torch.int32)).bool().tolist()

    def agree(self, value: float) -> float:
        """Largest value of all ranks."""
        return self.mesh.control.agree(value)

    def least(self, value: float) -> float:
        """Smallest value of all ranks."""
        return -self.mesh.control.agree(-value)

    def take_sent_bytes(self) -> dict[str, int]:
        """Bytes that this rank sent in each kind of exchange since the last call."""
        if self.world is None:
            return {}
        sent = dict(self.world.sent)
        self.world.sent.clear()
        return sent

    def capturer(self, device: Device) -> Capturer | None:
        """Capturer for steps of all ranks; None where the device captures nothing."""
        capturer = device.capturer()
        if capturer is None or self.world is None:
            return capturer
        return RankGroupCapturer(capturer, self.mesh.rank_group, self.world.sent, device.torch)

    @property
    def survive_failures(self) -> bool:
        """Whether the ranks can go on after an error in `attempt`."""
        return self.world is None or self.world.can_rebuild

    def attempt(self, run: Callable[[], Output]) -> Output:
        """Call `run`, as all ranks do together. After an error on any rank it fails on all, and they connect anew.

        Raises the error of `run` on the rank where it failed, PeerFailedError on the others, and RanksLostError when
        the ranks cannot go on.
        """
        self.num_attempts += 1
        try:
            return run()
        except Exception as error:
            if self.world is None:
                raise
            interrupted = isinstance(error, GroupBrokenError)
            self._reconnect(self.world, _INTERRUPTED if interrupted else _FAILED, error)
            if interrupted:
                raise PeerFailedError("another rank failed") from error
            raise

    def attempt_decode(self, run: Callable[[], Output]) -> Output:
        """Call `run`, as all ranks of `Mesh.vae` do together. After an error on one of them it fails on all of them.

        Raises like `attempt`. Other ranks do not notice, and nothing connects anew: see `DecodeGroup.tell`.
        """
        group = self.mesh.vae
        try:
            try:
                output = run()
            except (GroupBrokenError, PeerFailedError):
                raise
            except Exception:  # whatever it is, the other ranks must not wait for this one
                group.tell(failed=True)
                raise
            group.tell(failed=False)
        except GroupBrokenError as error:
            raise RanksLostError(f"ranks that share a decode lost each other: {error}") from error
        return output

    def _reconnect(self, world: World, outcome: int, error: Exception) -> None:
        """Disconnect, which frees ranks that wait for this one, and connect anew. All ranks hold all request states."""
        if not world.can_rebuild:
            raise RanksLostError(f"a rank failed in the middle of a step: {error}") from error
        logger.warning("a rank failed in the middle of a step (here: %s); the ranks connect anew", error)
        try:
            world.rebuild()
            outcomes = self.mesh.control.all_gather(torch.tensor([self.num_attempts, outcome])).tolist()
        except RuntimeError as lost:
            raise RanksLostError(f"the ranks did not meet again: {lost}") from error
        if len({num_attempts for num_attempts, _ in outcomes}) > 1 or all(code == _INTERRUPTED for _, code in outcomes):
            raise RanksLostError(f"ranks failed in different steps, or none says why: {error}") from error


class RankGroupCapturer:
    """Capturer of one rank of a rank group, whose ranks all capture the same blocks at the same time.

    If the capture fails on one rank, no rank uses it. The bytes of an exchange count as sent at each replay, not at the
    capture.
    """

    failure: str | None = None
    """See `Capturer`; set on all ranks of the group or on none."""

    def __init__(self, capturer: Capturer, group: Group, sent: Counter[str], device: torch.device) -> None:
        """group: the ranks, which exchange tensors on `device`; sent: counter of the bytes they exchange."""
        self._capturer = capturer
        self._group = group
        self._sent = sent
        self._device = device

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Capture `run` on all ranks or none; see `Capturer.capture`. Raises its errors, other ranks' too."""
        before = Counter(self._sent)
        cost: Counter[str] = Counter()

        def counted() -> Output:
            nonlocal cost
            start = Counter(self._sent)
            output = run()
            cost = self._sent - start
            return output

        captured = None
        outcome, reason = _CAPTURED, "on another rank"
        try:
            captured = self._capturer.capture(counted)
        except torch.OutOfMemoryError as error:
            outcome, reason = _NO_MEMORY, str(error)
        except Exception as error:
            outcome, reason = _NOT_CAPTURED, str(error)
        self._sent.clear()
        self._sent.update(before)
        worst = float(self._group.all_max(torch.tensor(outcome, device=self._device)))
        if worst == _NO_MEMORY:
            raise torch.OutOfMemoryError(reason)
        if captured is None or worst == _NOT_CAPTURED:
            raise RuntimeError(reason)
        output, replay_here = captured

        def replay() -> None:
            replay_here()
            self._sent.update(cost)

        return output, replay

    def release(self) -> None:
        self._capturer.release()
