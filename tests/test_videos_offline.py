"""`AsyncOmni` and `Omni` with a packed video model over a fake device: frames, pictures, progress and files."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from testbed.fakes import FakeExecutor, FakeRunner, fake_checkpoint, fake_image, fake_video, make_ready, make_request
from tests.diffusion.control.builders import VIDEO
from vllm_omni import AsyncOmni, Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logs.bars import progress_bar
from vllm_omni.outputs import OmniRequestOutput, write_video

SLOW_DECODE = make_ready(decode_units_per_token=100.0)
"""A piece of a decode is one latent frame."""
NUM_FRAMES, NUM_STEPS = 17, 4


@pytest.fixture(autouse=True)
def device() -> Iterator[FakeExecutor]:
    executor = FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE))
    with (
        patch("vllm_omni.omni.make_executor", lambda config, info: executor),
        patch("vllm_omni.omni.load_model_info", return_value=VIDEO),
        patch("vllm_omni.omni.check_model_files"),
    ):
        yield executor


def expected(seed: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    return fake_video(make_request(size=(64, 96), seed=seed, num_frames=num_frames))


async def outputs_of(**params: Any) -> list[OmniRequestOutput]:
    async with AsyncOmni("video") as omni:
        return [output async for output in omni.generate("a panda", OmniDiffusionSamplingParams(seed=3, **params))]


def test_each_output_is_a_list_of_frames_an_array_or_a_picture() -> None:
    params = [
        OmniDiffusionSamplingParams(seed=1, num_outputs_per_prompt=2),
        OmniDiffusionSamplingParams(seed=5, num_frames=9, output_type="np"),
        OmniDiffusionSamplingParams(seed=7, num_frames=1),
        OmniDiffusionSamplingParams(seed=8, num_frames=1, output_type="np"),
        OmniDiffusionSamplingParams(seed=9, seconds=0.5, fps=8),
    ]
    with Omni("video", progress_bar=False) as omni:
        two, array, picture, picture_array, short = omni.generate(["a"] * len(params), params)
    for seed, frames in zip((1, 2), two.images):
        listed: Any = frames
        assert all(isinstance(frame, Image.Image) for frame in listed)
        assert np.array_equal(np.stack([np.asarray(frame) for frame in listed]), expected(seed))
    (made,) = array.images
    assert isinstance(made, np.ndarray)
    assert np.array_equal(made, expected(5, 9))
    assert np.array_equal(np.asarray(picture.images[0]), fake_image(make_request(size=(64, 96), seed=7)))
    assert picture_array.images[0].shape == (64, 96, 3)
    assert np.array_equal(np.stack(short.images), expected(9, 5)[None])
    assert [output.fps for output in (two, array, picture, short)] == [16, 16, None, 8]


async def test_steps_previews_and_frames_are_streamed() -> None:
    *progress, last = await outputs_of(num_previews=1, output_type="np")
    steps = [output.step for output in progress if not output.images and output.frames is None]
    assert steps == [0, 1, 2, 3, 4]
    (preview,) = [output for output in progress if output.images and output.step < NUM_STEPS]
    assert preview.images[0].shape == (64, 96, 3), "one frame"
    pieces = [output for output in progress if output.frames is not None]
    assert [piece.first_frame for piece in pieces] == [0, 1, 5, 9, 13]
    assert all((piece.step, piece.num_inference_steps) == (NUM_STEPS, NUM_STEPS) for piece in pieces)
    has_frames = [output.frames is not None for output in progress]
    assert has_frames == [False] * (NUM_STEPS + 2) + [True] * 5 + [False], "begin, steps, preview, pieces, the video"
    decoded: list[Any] = [piece.frames for piece in pieces]
    assert np.array_equal(np.concatenate(decoded), expected(3))
    assert last.finished
    assert np.array_equal(last.images[0], expected(3))


@pytest.mark.parametrize("num_videos", [1, 2])
def test_the_bars_count_steps_and_frames(num_videos: int) -> None:
    bars: list[tqdm] = []

    def recorded_bar(*args: object, **settings: object) -> tqdm:
        bars.append(progress_bar(*args, **settings))  # type: ignore[arg-type]
        return bars[-1]

    with patch("vllm_omni.omni.progress_bar", recorded_bar), Omni("video") as omni:
        params = [
            OmniDiffusionSamplingParams(num_outputs_per_prompt=num_videos),
            OmniDiffusionSamplingParams(num_frames=1),
        ]
        omni.generate(["a", "b"], params)
    steps, frames = bars
    assert steps.n == steps.total == (num_videos + 1) * NUM_STEPS
    assert frames.n == frames.total == num_videos * NUM_FRAMES


def test_a_wrong_length_fails_before_anything_runs(device: FakeExecutor) -> None:
    with Omni("video", progress_bar=False) as omni:
        params = [OmniDiffusionSamplingParams(), OmniDiffusionSamplingParams(num_frames=16)]
        with pytest.raises(InvalidRequestError, match=r"prompts\[1\]: num_frames 16 is not 1 more .* nearest .* is 17"):
            omni.generate(["a", "b"], params)
    assert device.num_plans == 0


def test_an_output_becomes_a_file(tmp_path: Path) -> None:
    with Omni("video", progress_bar=False) as omni:
        (output,) = omni.generate("a panda", OmniDiffusionSamplingParams(seconds=1.0))
    assert output.fps is not None
    write_video(output.images[0], tmp_path / "panda.mp4", output.fps)
    with av.open(str(tmp_path / "panda.mp4")) as container:
        (stream,) = container.streams.video
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (NUM_FRAMES, Fraction(16), 96, 64)


async def test_checkpoints_are_streamed_and_a_request_resumes_from_one() -> None:
    params = OmniDiffusionSamplingParams(seed=3, output_type="np")
    async with AsyncOmni("video") as omni:
        outputs = [output async for output in omni.generate("a panda", params, checkpoint_seconds=1e-9)]
        saved = [output for output in outputs if output.checkpointed]
        checkpoints = [output.checkpoint for output in saved if output.checkpoint is not None]
        assert [checkpoint.step for checkpoint in checkpoints] == [output.step for output in saved] == [1, 2, 3, 4]
        for checkpoint in checkpoints:
            resumed = [output async for output in omni.generate("a panda", params, resume=checkpoint)]
            steps = [output.step for output in resumed if output.frames is None and not output.images]
            assert steps == [*range(checkpoint.step, NUM_STEPS + 1)]
            assert np.array_equal(resumed[-1].images[0], expected(3))


async def test_a_checkpoint_is_given_when_it_is_asked_for(device: FakeExecutor) -> None:
    params = OmniDiffusionSamplingParams(seed=3, num_outputs_per_prompt=2)
    async with AsyncOmni("video") as omni:
        device.hold = True
        stream = omni.generate("a panda", params, "job")
        omni.request_checkpoint("unknown")
        omni.request_checkpoint("job")
        answers = [await anext(stream) for _ in range(2)]
        assert [(answer.index, answer.checkpointed, answer.checkpoint) for answer in answers] == [
            (0, True, None),
            (1, True, None),
        ]
        assert not any(answer.started for answer in answers)
        device.hold = False
        asked = False
        async for output in stream:
            if output.step == 2 and not asked:
                omni.request_checkpoint("job")
                asked = True
            if output.checkpoint is not None:
                answers.append(output)
    assert sorted(answer.index for answer in answers[2:]) == [0, 1]


async def test_wrong_checkpoints_are_refused_before_anything_runs(device: FakeExecutor) -> None:
    checkpoint = fake_checkpoint(make_request(seed=3), NUM_STEPS + 1)
    async with AsyncOmni("video") as omni:
        num_plans = device.num_plans
        with pytest.raises(InvalidRequestError, match=f"step {NUM_STEPS + 1}, this request has steps 1 to {NUM_STEPS}"):
            omni.generate("a panda", OmniDiffusionSamplingParams(seed=3), resume=checkpoint)
        with pytest.raises(InvalidRequestError, match="checkpoint_seconds takes a number above 0"):
            omni.generate("a panda", OmniDiffusionSamplingParams(seed=3), checkpoint_seconds=0)
        assert device.num_plans == num_plans
