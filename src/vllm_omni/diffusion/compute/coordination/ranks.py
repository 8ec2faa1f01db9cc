"""What a model runner asks of the other ranks of its replica: who skips what, and what to do when one of them fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from vllm_omni.diffusion.compute.coordination.capture_agreement import RankGroupCapturer
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.distributed.groups import GroupBrokenError
from vllm_omni.diffusion.compute.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh, World
from vllm_omni.diffusion.compute.step.cuda_graphs import Capturer
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

logger = logging.getLogger(__name__)

Output = TypeVar("Output")

_DISTURBED, _GUILTY = 0, 1


class PeerFailedError(Exception):
    """Another rank failed at what all ranks did together; that one says why."""


class RanksLostError(Exception):
    """The ranks do not know any more where the others are: they must all start again."""


def connect(parallel: DiffusionParallelConfig, place: RankInfo, device: Device) -> World:
    """Meet the other ranks of the replica; each must call this."""
    listens = place.store_fd is not None
    store = TCPStore(
        "127.0.0.1",
        place.store_port,
        is_master=listens,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=place.store_fd,
    )
    return World(parallel, place.rank, device.torch, store)


class Ranks:
    """The ranks of a replica, seen by one of them. A replica of one rank (`world` None) has nobody to ask."""

    def __init__(self, world: World | None = None) -> None:
        self.mesh = Mesh.single() if world is None else world.mesh
        self._world = world
        self._num_attempts = 0

    @property
    def size(self) -> int:
        return self.mesh.world.size

    def unite(self, votes: Sequence[bool]) -> list[bool]:
        """Of each vote, whether any rank casts it. All ranks must bring equally many."""
        if self.size == 1:
            return list(votes)
        return self.mesh.control.all_max(torch.tensor(votes, dtype=torch.int32)).bool().tolist()

    def agree(self, value: float) -> float:
        """The largest of the ranks' values."""
        return self.mesh.control.agree(value) if self.size > 1 else value

    def take_sent_bytes(self) -> dict[str, int]:
        """Bytes handed to each kind of exchange since the last call."""
        if self._world is None:
            return {}
        sent = dict(self._world.sent)
        self._world.sent.clear()
        return sent

    def capturer(self, device: Device) -> Capturer | None:
        """The device's, for steps of all ranks."""
        capturer = device.capturer()
        if capturer is None or self._world is None:
            return capturer
        return RankGroupCapturer(capturer, self.mesh.rank_group, self._world.sent, device.torch)

    @property
    def survive_failures(self) -> bool:
        """Whether `attempt` leaves them able to go on."""
        return self._world is None or self._world.can_rebuild

    def attempt(self, run: Callable[[], Output]) -> Output:
        """`run`, which all ranks do together. If it fails on any rank it fails on all, and they meet again.

        Raises what `run` raised here, PeerFailedError where it was another rank that failed, and RanksLostError
        when going on is impossible.
        """
        self._num_attempts += 1
        try:
            return run()
        except Exception as error:
            if self._world is None:
                raise
            disturbed = isinstance(error, GroupBrokenError)
            self._meet_again(self._world, _DISTURBED if disturbed else _GUILTY, error)
            if disturbed:
                raise PeerFailedError("another rank failed") from error
            raise

    def _meet_again(self, world: World, outcome: int, error: Exception) -> None:
        """Leave, which frees those that wait for this rank, and connect anew. States are replicated: none is lost."""
        if not world.can_rebuild:
            raise RanksLostError(f"a rank failed in the middle of a step: {error}") from error
        logger.warning("a rank failed in the middle of a step (here: %s); the ranks connect anew", error)
        try:
            world.rebuild()
            said = self.mesh.control.all_gather(torch.tensor([self._num_attempts, outcome])).tolist()
        except RuntimeError as lost:
            raise RanksLostError(f"the ranks did not meet again: {lost}") from error
        if len({num_attempts for num_attempts, _ in said}) > 1 or all(code == _DISTURBED for _, code in said):
            raise RanksLostError(f"ranks failed in different steps, or none says why: {error}") from error
