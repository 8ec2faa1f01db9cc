"""Progress follows the work and never falls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from testbed.fakes import make_scheduled
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.video_jobs.progress import MAKING_PERCENT, JobProgress

SCHEDULED = make_scheduled(steps=10, num_frames=17, num_latent_frames=5)


def at_step(step: int) -> OmniRequestOutput:
    return OmniRequestOutput("r", "", step=step, num_inference_steps=10)


def with_frames(first: int, number: int) -> OmniRequestOutput:
    frames = np.zeros((number, 16, 16, 3), np.uint8)
    return OmniRequestOutput("r", "", step=10, num_inference_steps=10, first_frame=first, frames=frames)


def test_steps_and_frames_count_by_their_cost() -> None:
    progress, cost = JobProgress(SCHEDULED, 0), SCHEDULED.cost
    progress.note(at_step(0))
    assert progress.percent == 0
    progress.note(at_step(5))
    share = (cost.encode + 5 * cost.step) / cost.total(10)
    assert progress.percent == int(MAKING_PERCENT * share)
    progress.note(with_frames(0, 5))
    share = (cost.encode + 10 * cost.step + cost.decode * 5 / 17) / cost.total(10)
    assert progress.percent == int(MAKING_PERCENT * share)
    progress.note(with_frames(5, 12))
    assert progress.percent == MAKING_PERCENT


def test_pieces_of_the_encode_count_until_the_first_step() -> None:
    cost = replace(SCHEDULED.cost, encode=SCHEDULED.cost.total(10))
    progress = JobProgress(replace(SCHEDULED, cost=cost), 0)
    percents = []
    for share in (0.5, 1.0, 0.5):  # after a death it is encoded again
        progress.note(OmniRequestOutput("r", "", num_inference_steps=10, encoded_share=share))
        percents.append(progress.percent)
    share = cost.encode / cost.total(10)
    assert percents == [int(MAKING_PERCENT * share / 2), int(MAKING_PERCENT * share), int(MAKING_PERCENT * share)]
    progress.note(at_step(5))
    assert progress.percent == int(MAKING_PERCENT * (cost.encode + 5 * cost.step) / cost.total(10))


@pytest.mark.parametrize("earlier", [0, 60])
def test_it_never_falls(earlier: int) -> None:
    progress = JobProgress(SCHEDULED, earlier)
    percents = []
    for output in (at_step(5), at_step(1), at_step(2), at_step(9), with_frames(0, 5), at_step(9)):
        progress.note(output)
        percents.append(progress.percent)
    assert percents == sorted(percents)
    assert percents[0] >= earlier
