"""Decodes of videos, which are cut into pieces: the length of a piece, and the ranks that decode it."""

from __future__ import annotations

from collections import Counter

PIECE_SECONDS = 0.25
"""Duration of a piece, as far as whole latent frames allow: other requests wait that long at most for a decode."""


def frames_of_piece(seconds_per_frame: float) -> int:
    """Latent frames that are decoded in `PIECE_SECONDS`, at least 1. seconds_per_frame: measured for one of them."""
    return max(1, int(PIECE_SECONDS / seconds_per_frame)) if seconds_per_frame > 0 else 1


class DecodeGroups:
    """Groups of ranks that share a decode (`Mesh.vae`), and the videos that each has begun.

    The group that decodes the first piece of a video keeps the features that the next piece needs, so it decodes all of
    them.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self._videos: dict[str, int] = {}
        """Request id -> number of its group, for videos whose decode has begun."""

    def take(self, request_id: str, busy: set[int]) -> bool:
        """Whether the next piece of a video can be decoded in the plan that is being made; then `group_of` has a group.

        busy: groups that have a piece in this plan; the call adds to it. A group decodes one piece in a plan, because
        decodes gain nothing from company and each begun video holds memory.
        """
        group = self._videos.get(request_id)
        if group is None:
            counts = Counter(self._videos.values())
            free = [group for group in range(self.num_groups) if group not in busy]
            group = min(free, key=counts.__getitem__, default=None)
        if group is None or group in busy:
            return False
        busy.add(group)
        self._videos[request_id] = group
        return True

    def group_of(self, request_id: str) -> int:
        """Group of a video whose decode has begun."""
        return self._videos[request_id]

    def release(self, request_id: str) -> None:
        """Forget a request that ended or starts again."""
        self._videos.pop(request_id, None)
