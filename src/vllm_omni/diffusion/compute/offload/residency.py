"""Which components lie on a device: the arithmetic of turns. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


class Residency:
    """Components on a device, least recently used first, and those that leave when another one comes."""

    def __init__(self, sizes: Mapping[str, int], max_bytes: int) -> None:
        """sizes: bytes of each component. max_bytes: most bytes of components that stay on the device together."""
        self.sizes = dict(sizes)
        self.max_bytes = max_bytes
        self._present: list[str] = []

    @property
    def present(self) -> tuple[str, ...]:
        """Components on the device, least recently used first."""
        return tuple(self._present)

    @property
    def num_bytes(self) -> int:
        """Bytes of the components on the device."""
        return sum(self.sizes[name] for name in self._present)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of components that are on the device at a time."""
        return min(sum(self.sizes.values()), max(self.max_bytes, *self.sizes.values()))

    def leaving_for(self, name: str, in_use: Collection[str] = ()) -> list[str]:
        """Components that leave before `name` comes, least recently used first, and no more than needed.

        Those in use stay, even if the bytes exceed `max_bytes` then: `max_bytes` leaves room for activations.
        """
        if name in self._present:
            return []
        leaving: list[str] = []
        surplus = self.num_bytes + self.sizes[name] - self.max_bytes
        for other in self._present:
            if surplus <= 0:
                break
            if other not in in_use:
                leaving.append(other)
                surplus -= self.sizes[other]
        return leaving

    def leave(self, name: str) -> None:
        """Note that a component has left."""
        self._present.remove(name)

    def note_use(self, name: str) -> None:
        """Note that a component is on the device and is used now."""
        if name in self._present:
            self._present.remove(name)
        self._present.append(name)

    def bytes_of_interruption(self, work: Sequence[str], interruption: Sequence[str]) -> int:
        """Bytes copied when uses of `work`, again and again, are interrupted by uses of `interruption`: there and back.

        Counted from a device where both have happened before. The state of this object stays as it is.
        """
        at = Residency(self.sizes, self.max_bytes)
        at._use_in_order([*work, *interruption, *work])
        return at._use_in_order([*interruption, *work])

    def _use_in_order(self, names: Sequence[str]) -> int:
        """Use components one after another. Returns the bytes of those that had to come."""
        num_bytes = 0
        for name in names:
            if name not in self._present:
                for other in self.leaving_for(name):
                    self.leave(other)
                num_bytes += self.sizes[name]
            self.note_use(name)
        return num_bytes
