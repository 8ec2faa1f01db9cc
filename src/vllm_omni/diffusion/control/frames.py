"""Numbers of frames that a server accepts, and the number that a length in seconds asks for."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError

SECONDS_TOLERANCE = 0.05
"""Part of a frame by which `seconds` may miss a valid length: clients send rounded decimals."""


@dataclass(frozen=True)
class FrameLimits:
    """Valid numbers of frames: 1, 1 + multiple, 1 + 2 multiple, ... up to `most`. One frame is a picture."""

    multiple: int
    """Frames that a latent frame after the first stands for."""
    most: int

    @classmethod
    def of(cls, config: OmniDiffusionConfig, info: ModelInfo) -> FrameLimits:
        """Limits of a server; the default limit is the model's own number of frames."""
        most = config.max_num_frames
        if most is None:
            most = int(info.default_sampling_params["num_frames"])
        return cls(info.frame_multiple or 1, most)

    def check(self, num_frames: int) -> None:
        """Raise InvalidRequestError, with the nearest valid numbers, for a number that is not valid."""
        below = self._valid_below(num_frames)
        if num_frames == below:
            return
        if num_frames < 1:
            reason = "is not at least 1"
        elif num_frames > self.most:
            reason = f"is more than {self.most} (--max-num-frames)"
        else:
            reason = f"is not 1 more than a multiple of {self.multiple}"
        neighbours = [n for n in (below, below + self.multiple) if self._least(num_frames) <= n <= self.most]
        nearest = min(neighbours, key=lambda n: abs(n - num_frames))
        advice = f"the nearest valid number is {nearest}"
        if neighbours[0] < num_frames < neighbours[-1]:
            advice += f" (valid below and above: {below} and {neighbours[1]})"
        raise InvalidRequestError(f"num_frames {num_frames} {reason}; {advice}", param="num_frames")

    def of_seconds(self, seconds: float, fps: int) -> int:
        """Number of frames of a video whose last frame is shown `seconds` after its first one.

        Raises InvalidRequestError, with the nearest valid length, if no valid number of frames has this length.
        """
        frames = 1 + seconds * fps
        for valid in (1, nearest := self._nearest(frames)):
            if abs(frames - valid) <= SECONDS_TOLERANCE:
                return valid
        limit = f", up to {self.most} (--max-num-frames)" if frames > self.most else ""
        raise InvalidRequestError(
            f"seconds {shown_seconds(seconds)} at {fps} frames a second: a video has 1 frame more than a multiple of "
            f"{self.multiple}{limit}; the nearest valid value is {(nearest - 1) / fps:.6g} "
            f"({nearest} {'frame' if nearest == 1 else 'frames'})",
            param="seconds",
        )

    def _valid_below(self, frames: float) -> int:
        """Largest valid number up to `frames`, at least 1."""
        return 1 + int(max(min(frames, self.most) - 1, 0)) // self.multiple * self.multiple

    def _nearest(self, frames: float) -> int:
        below = self._valid_below(frames)
        above = below + self.multiple
        if above > self.most:
            return below
        return above if above - frames < frames - below or below < self._least(frames) else below

    def _least(self, frames: float) -> int:
        """Least number to advise to a caller who asked for `frames`: whoever wants more than one wants a video."""
        return min(1 + self.multiple, self._valid_below(self.most)) if frames > 1 else 1


def shown_seconds(seconds: float) -> str:
    """A length as people write it: without an exponent, unless it is absurdly long."""
    return f"{seconds:.12g}"
