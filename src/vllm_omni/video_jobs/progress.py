"""Progress of a job in percent, from the share of its work that is done."""

from __future__ import annotations

from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.outputs import OmniRequestOutput

MAKING_PERCENT = 98
"""Percent when all frames are decoded. The rest is their encoding and writing, which mostly runs beside the decode."""
WRITING_PERCENT = 99
"""Percent when all frames are encoded and the files are being written; 100 is a completed job."""


class JobProgress:
    """Percent of a job, which never falls: not after a replay, nor on another server."""

    def __init__(self, scheduled: ScheduledRequest, percent: int) -> None:
        """`percent`: progress so far, from the job's row."""
        self._cost = scheduled.cost
        self._num_steps = scheduled.num_steps
        self._num_frames = scheduled.request.num_frames
        self.percent = percent

    def note(self, output: OmniRequestOutput) -> None:
        """Count the pieces of the encode, the steps or the frames that a progress output reports."""
        encoded = 1.0 if output.step > 0 else output.encoded_share
        done = self._cost.encode * encoded + output.step * self._cost.step
        if output.frames is not None:
            done += self._cost.decode * (output.first_frame + len(output.frames)) / self._num_frames
        self.percent = max(self.percent, int(MAKING_PERCENT * done / self._cost.total(self._num_steps)))
