"""Videos of Wan that are decoded piece by piece between steps of others, against the same videos decoded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.runner_driver import Drive, kept
from tests.diffusion.compute.families.wan.test_videos import request, started
from tests.diffusion.compute.worker.scheduled_replica import Replica
from vllm_omni.diffusion.data import DiffusionParallelConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.thorough
def test_pieces_are_the_whole_videos(wan_model: Callable[[str], Path]) -> None:
    length = {"max_sequence_length": 24, "height": 32, "width": 32}
    requests = [
        request("long", "a red apple", num_inference_steps=2, seed=1, **length),
        request("short", "a car", num_frames=5, num_inference_steps=3, seed=2, **length),
        request("picture", "blue", num_frames=1, num_inference_steps=3, seed=3, **length),
    ]
    runner = started(wan_model("ti2v-5b"))
    whole = {one.request_id: Drive(runner).run({0: [one]}).images[one.request_id] for one in requests}
    replica = Replica(runner, DiffusionParallelConfig())
    replica.add(requests[:1])
    while not replica.frames:
        replica.step()
    replica.add(requests[1:])
    made = replica.run()
    assert replica.errors == {}
    assert made.keys() == whole.keys()
    for request_id, pixels in made.items():
        assert pixels.shape == whole[request_id].shape
        assert abs(pixels.astype(int) - whole[request_id]).max() <= 1
    assert [len(piece) for piece in replica.frames["long"]] == [1, 4, 4]
    assert kept(runner) == 0
