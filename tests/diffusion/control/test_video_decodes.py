"""Decodes of videos, which are cut into pieces: plans of the scheduler, and events of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from testbed.fakes import (
    SECONDS_PER_UNIT,
    FakeExecutor,
    FakeRunner,
    fake_image,
    fake_video,
    make_config,
    make_ready,
    make_scheduled,
)
from tests.diffusion.control.engines import (
    NotedEvents,
    iter_nowait,
    now_request,
    read_until_done,
    running_engine,
    until,
)
from tests.diffusion.control.running import run_ahead, run_one, run_out, runner_that_lacks_memory_once
from vllm_omni.diffusion.control.decode_groups import PIECE_SECONDS
from vllm_omni.diffusion.control.events import EngineEvent, Finished, Frames, Preview, Started, StepDone
from vllm_omni.diffusion.control.executor.merging import merge_results
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import RequestAbortedError
from vllm_omni.jobs import Job

PIECE_UNITS = PIECE_SECONDS / SECONDS_PER_UNIT
LATENT_FRAMES = 5
STEPS = 2


def video(request_id: str = "video", frames_per_piece: float = 1.0, **values: Any) -> ScheduledRequest:
    """A video of five latent frames, which decodes so many of them in the time of a piece."""
    num_latent_frames = values.pop("num_latent_frames", LATENT_FRAMES)
    decode = num_latent_frames * PIECE_UNITS / frames_per_piece
    return now_request(
        request_id,
        16,
        STEPS,
        cost=RequestCost(encode=10.0, step=500.0, decode=decode, branch_tokens=(500,)),
        num_latent_frames=num_latent_frames,
        num_frames=4 * num_latent_frames - 3,
        **values,
    )


def make_scheduler(max_batch_tokens: int = 8192, **settings: Any) -> Scheduler:
    return Scheduler(make_config(**settings), make_ready(max_batch_tokens=max_batch_tokens))


def plans_until_done(scheduler: Scheduler, runner: FakeRunner | None = None) -> list[StepPlan]:
    runner = runner or FakeRunner()
    run_out(scheduler, runner)
    return runner.plans


class FakeReplica(FakeRunner):
    """Several ranks, each of which is a group that decodes videos of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._ranks = [FakeRunner(rank_info=RankInfo(rank, size)) for rank in range(size)]

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return merge_results([rank.execute(plan) for rank in self._ranks])


def pieces_of(plans: list[StepPlan], request_id: str = "video") -> list[tuple[int, int]]:
    return [(p.first, p.end) for plan in plans if (p := plan.pieces.get(request_id)) is not None]


# Scheduler ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames_per_piece", "pieces"),
    [
        (0.3, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),  # at least one
        (2.5, [(0, 2), (2, 4), (4, 5)]),
        (9.0, [(0, 5)]),
    ],
)
def test_a_piece_takes_a_quarter_of_a_second(frames_per_piece: float, pieces: list[tuple[int, int]]) -> None:
    scheduler = make_scheduler()
    scheduler.add([video(frames_per_piece=frames_per_piece)])
    assert pieces_of(plans_until_done(scheduler)) == pieces


def test_a_picture_is_decoded_whole() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_scheduled("picture", 64, 2)])
    assert [(plan.decode, plan.pieces) for plan in plans_until_done(scheduler) if plan.decode] == [(["picture"], {})]


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_a_short_request_runs_between_the_pieces(policy: str) -> None:
    scheduler, runner = make_scheduler(scheduling_policy=policy), FakeRunner()
    scheduler.add([video(num_latent_frames=9)])
    while not pieces_of(runner.plans):
        run_one(scheduler, runner)
    scheduler.add([make_scheduled("short", 64, 2)])
    plans = plans_until_done(scheduler, runner)
    done = next(number for number, plan in enumerate(plans) if "short" in plan.decode)
    assert len(pieces_of(plans[: done + 1])) == {"fair": 1, "fcfs": 5}[policy]
    assert len(pieces_of(plans)) == 9


def test_all_but_the_last_piece_take_company() -> None:
    scheduler, runner = make_scheduler(scheduling_policy="fcfs"), FakeRunner()
    scheduler.add([video(), make_scheduled("long", 64, 20)])
    plans = [plan for plan in plans_until_done(scheduler, runner) if plan.pieces]
    assert [plan.denoise for plan in plans] == [["long"]] * (LATENT_FRAMES - 1) + [[]]


def test_remaining_work_and_previews_count_latent_frames() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    request = video(preview_steps=(1,))
    scheduler.add([request])
    overhead = make_ready().step_overhead_seconds / SECONDS_PER_UNIT
    steps = 10.0 + STEPS * (500.0 + overhead)
    expected = [steps + (LATENT_FRAMES + 1) * PIECE_UNITS, *(n * PIECE_UNITS for n in range(LATENT_FRAMES - 1, -1, -1))]
    seen = [scheduler.queue_seconds / scheduler.seconds_per_unit]
    while plan := scheduler.schedule():
        result = runner.execute(plan)
        scheduler.update(result, 0.01)
        if plan.pieces:
            seen.append(scheduler.queue_seconds / scheduler.seconds_per_unit)
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("shared_by", [1, 2])
def test_each_group_of_ranks_decodes_videos_of_its_own(shared_by: int) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=4, vae_patch_parallel_size=shared_by)
    num_groups = 4 // shared_by
    # All videos are denoised together, but two pieces exceed the budget of tokens.
    scheduler = make_scheduler(max_batch_tokens=4000, parallel=parallel)
    scheduler.add([video(f"v{n}") for n in range(2 * num_groups)])
    runner = FakeReplica(num_groups)  # its ranks assert that no video changes its group
    assert sorted(run_out(scheduler, runner)) == [f"v{n}" for n in range(2 * num_groups)]
    groups = [sorted(piece.group for piece in plan.pieces.values()) for plan in runner.plans if plan.pieces]
    assert groups == [list(range(num_groups))] * (2 * LATENT_FRAMES)


@pytest.mark.parametrize("ends", ["finished", "aborted", "replayed"])
def test_a_video_begins_on_the_group_with_the_fewest(ends: str) -> None:
    scheduler = make_scheduler(parallel=DiffusionParallelConfig(ulysses_degree=2))
    runner = FakeReplica(2)
    for request in (video("a", num_latent_frames=9), video("b", priority=-1)):
        scheduler.add([request])
        while not pieces_of(runner.plans, request.request_id):
            run_one(scheduler, runner)
    assert [runner.plans[-1].pieces[i].group for i in ("a", "b")] == [0, 1]
    if ends == "finished":
        while (4, 5) not in pieces_of(runner.plans, "b"):
            run_one(scheduler, runner)
        assert len(pieces_of(runner.plans, "a")) < 9
    elif ends == "aborted":
        scheduler.abort(["b"])
    else:
        scheduler.reset()
        scheduler.abort(["b"])
        runner = FakeReplica(2)
    scheduler.add([video("c", priority=-2)])
    run_out(scheduler, runner)
    assert {plan.pieces["c"].group for plan in runner.plans if "c" in plan.pieces} == {0 if ends == "replayed" else 1}


def test_an_abort_takes_effect_between_two_pieces() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    scheduler.add([video(), video("other")])
    while len(pieces_of(runner.plans)) < 2:
        run_one(scheduler, runner)
    assert scheduler.abort(["video"]) == {"video": True}
    plan = run_one(scheduler, runner)
    assert (plan.release, list(plan.pieces)) == (["video"], ["other"])
    assert pieces_of(plans_until_done(scheduler, runner), "other") == [(n, n + 1) for n in range(LATENT_FRAMES)]
    assert runner.num_states == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_piece_without_memory_in_company_begins_the_request_again_alone(depth: int) -> None:
    scheduler, runner = make_scheduler(scheduling_policy="fcfs"), runner_that_lacks_memory_once("decode", first=2)
    scheduler.add([video(), make_scheduled("long", 64, 30)])
    assert sorted(run_ahead(scheduler, runner, depth)) == ["long", "video"]
    frames = [first for first, _ in pieces_of(runner.plans)]
    assert frames[: frames.index(2) + 1] == [0, 1, 2]
    assert frames[-LATENT_FRAMES:] == [0, 1, 2, 3, 4]


# Engine ---------------------------------------------------------------------------------------------------------------


def check_frames(events: list[EngineEvent], request: ScheduledRequest) -> None:
    """The frames of a video came in order, each once, and the last event has them all."""
    mine = [event for event in events if event.request_id == request.request_id]
    frames = [event for event in mine if isinstance(event, Frames)]
    wanted = fake_video(request.request)
    assert [frames[0].first, *(a.first + len(a.pixels) for a in frames)] == [*(b.first for b in frames), len(wanted)]
    assert np.array_equal(np.concatenate([event.pixels for event in frames]), wanted)
    finished = mine[-1]
    assert isinstance(finished, Finished)
    assert np.array_equal(finished.image, wanted)


async def test_frames_come_while_the_rest_is_decoded() -> None:
    request = video(preview_steps=(1,))
    async with running_engine() as engine:
        events = await read_until_done(engine.add([request]))
    kinds = [type(event) for event in events]
    assert kinds == [Started, StepDone, Preview, StepDone, *[Frames] * LATENT_FRAMES, Finished]
    assert [len(event.pixels) for event in events if isinstance(event, Frames)] == [1, 4, 4, 4, 4]
    check_frames(events, request)
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.timings["vae_decode"] == pytest.approx(LATENT_FRAMES * 0.003)


async def test_a_picture_finishes_before_a_video_that_is_being_decoded() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        request, short = video(), now_request("short", 64, 2, seed=1)
        events = engine.add([request])
        await release_until(executor, events, Frames)
        shorts = engine.add([short])
        executor.hold = False
        executor.release_results(len(executor.pending))
        (*_, picture) = await read_until_done(shorts)
        assert isinstance(picture, Finished)
        assert np.array_equal(picture.image, fake_image(short.request))
        assert not any(isinstance(event, Finished) for event in iter_nowait(events))


async def test_an_aborted_video_gives_no_further_frames() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([video()])
        await release_until(executor, events, Frames)
        engine.abort(["video"])
        executor.hold = False
        executor.release_results(len(executor.pending))
        (*before, failed) = await read_until_done(events)
        assert isinstance(failed.error, RequestAbortedError)  # type: ignore[union-attr]
        assert before == []
        await until(lambda: executor.runner.num_states == 0)
        num_pieces = len(pieces_of(executor.runner.plans))
        await read_until_done(engine.add([now_request("next", 64, 2)]))
        assert len(pieces_of(executor.runner.plans)) == num_pieces < LATENT_FRAMES


async def release_until(executor: FakeExecutor, events: asyncio.Queue[EngineEvent], kind: type[EngineEvent]) -> None:
    """Let the results of an executor that holds them go one by one until an event of `kind` came."""
    while True:
        await until(lambda: bool(executor.pending) or not events.empty())
        while not events.empty():
            if isinstance(events.get_nowait(), kind):
                return
        if executor.pending:
            executor.release_results()


@pytest.mark.parametrize("plan_number", range(8))
async def test_a_death_at_any_plan_repeats_no_frame(plan_number: int) -> None:
    requests = [video("a", seed=1), video("b", frames_per_piece=2, seed=2)]
    observer = NotedEvents()
    async with running_engine(FakeExecutor(die_at={3 + plan_number}), observer) as engine:
        events = await read_until_done(engine.add(requests), 2)
    assert observer.restarts
    for request in requests:
        check_frames(events, request)


def test_a_stream_of_outputs_brings_the_frames_before_the_video() -> None:
    request = video()
    job = Job("job", "a red apple", "np", [request])
    pixels = fake_video(request.request)
    piece = job.progress(Frames(request.request_id, 1, pixels[1:5]))
    assert (piece.images, piece.step, piece.first_frame) == ([], STEPS, 1)
    assert piece.frames is not None
    assert np.array_equal(piece.frames, pixels[1:5])
    done = job.progress(Finished(request.request_id, pixels, {}))
    assert (done.frames, done.step) == (None, STEPS)
    assert np.array_equal(done.images[0], pixels)
