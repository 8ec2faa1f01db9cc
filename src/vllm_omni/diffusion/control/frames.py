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
        neighbours = [below] + [n for n in (below + self.multiple,) if below < num_frames and n <= self.most]
        nearest = min(neighbours, key=lambda n: abs(n - num_frames))
        advice = f"the nearest valid number is {nearest}"
        if len(neighbours) == 2:
            advice += f" (valid below and above: {below} and {neighbours[1]})"
        raise InvalidRequestError(f"num_frames {num_frames} {reason}; {advice}", param="num_frames")

    def of_seconds(self, seconds: float, fps: int) -> int:
        """Number of frames of a video whose last frame is shown `seconds` after its first one.

        Raises InvalidRequestError, with the nearest valid length, if no valid number of frames has this length.
        """
        frames = 1 + seconds * fps
        nearest = self._nearest(frames)
        if abs(frames - nearest) <= SECONDS_TOLERANCE:
            return nearest
        limit = f", up to {self.most} (--max-num-frames)" if frames > self.most else ""
        raise InvalidRequestError(
            f"seconds {seconds:g} at {fps} frames a second: a video has 1 frame more than a multiple of "
            f"{self.multiple}{limit}; the nearest valid value is {(nearest - 1) / fps:.6g} ({nearest} frames)",
            param="seconds",
        )

    def _valid_below(self, frames: float) -> int:
        """Largest valid number up to `frames`, at least 1."""
        return 1 + int(max(min(frames, self.most) - 1, 0)) // self.multiple * self.multiple

    def _nearest(self, frames: float) -> int:
        below = self._valid_below(frames)
        above = below + self.multiple
        return above if above <= self.most and above - frames < frames - below else below
