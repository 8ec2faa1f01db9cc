"""Messages and arrays between the two ends of a socket pair."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import msgspec
import numpy as np
import pytest

from testbed.fakes import make_config, make_ready, make_request
from testbed.patience import GUARD_SECONDS, until
from tests.descriptors import SELECT_LIMIT, descriptors_left, low_descriptors_taken
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.checkpoint import Checkpoint, CheckpointValue
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult
from vllm_omni.diffusion.messages.worker import (
    Abort,
    Died,
    Done,
    Execute,
    FromWorker,
    Heartbeat,
    RankInfo,
    Ready,
    Start,
    ToWorker,
)
from vllm_omni.inputs.images import InputImage
from vllm_omni.processes import channel, outbox
from vllm_omni.processes.channel import AsyncChannel, BlockingChannel, ChannelBrokenError, FrameReader, encode_frame

DTYPES = ["u1", "<f4", "<f8", "<i8", "?"]


def random_array(rng: random.Random) -> np.ndarray:
    shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(0, 4)))
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 2, shape)
    array = np.asarray(values).astype(rng.choice(DTYPES))
    return array.T if rng.random() < 0.3 else array  # not contiguous


def random_result(rng: random.Random) -> StepResult:
    names = [f"r{n}" for n in range(rng.randint(0, 5))]
    return StepResult(
        step_id=rng.getrandbits(40),
        images={name: random_array(rng) for name in names},
        previews={name: random_array(rng) for name in names[:1]},
        errors={name: ItemError("é\n", "internal", "x" * rng.randint(0, 200_000)) for name in names[2:]},
        advanced=names,
        denoise_seconds=rng.random(),
    )


def assert_same(one: Any, other: Any) -> None:
    """Equal, arrays with dtype, shape and values included."""
    assert type(one) is type(other)
    if isinstance(one, Done):
        for field in ("images", "previews"):
            mine, theirs = getattr(one.result, field), getattr(other.result, field)
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)
                assert np.array_equal(mine[name], theirs[name])
        one, other = (msgspec.structs.asdict(m)["result"] for m in (one, other))
        for field in ("step_id", "errors", "advanced", "denoise_seconds"):
            assert getattr(one, field) == getattr(other, field)
    else:
        assert one == other


TO_WORKER = [
    Start(
        make_config(parallel=DiffusionParallelConfig(), default_sampling_params={"seed": 3}), RankInfo(1, 4, 2, 8080)
    ),
    Execute(StepPlan(1, [make_request("a", sigmas=(1.0, 0.5))], ["a"], release=["b"])),
    Abort(["a", "b"]),
]


@contextmanager
def blocking_pair() -> Iterator[tuple[BlockingChannel[Any], BlockingChannel[Any]]]:
    left, right = socket.socketpair()
    ends = BlockingChannel[Any](left, FromWorker), BlockingChannel[Any](right, ToWorker | FromWorker)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


@asynccontextmanager
async def mixed_pair() -> AsyncIterator[tuple[AsyncChannel[Any], BlockingChannel[Any]]]:
    """The engine's end and the worker's; the latter's calls belong into threads."""
    left, right = socket.socketpair()
    ours, theirs = AsyncChannel[Any](left, FromWorker), BlockingChannel[Any](right, ToWorker | FromWorker)
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_to_a_worker_round_trip() -> None:
    with blocking_pair() as (ours, theirs):
        for message in TO_WORKER:
            ours.send(message)
        for message in TO_WORKER:
            assert_same(theirs.receive(), message)


def test_pictures_that_requests_share_are_sent_once() -> None:
    images = (InputImage.of(np.ones((64, 64, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)),)
    requests = [make_request(f"r{n}", images=images) for n in range(4)]
    body, fd = encode_frame(Execute(StepPlan(3, new_requests=requests)))
    assert fd is not None
    assert os.fstat(fd).st_size < 512 * 512 * 3 + 64 * 64 * 3 + 100
    (message,) = FrameReader[ToWorker](ToWorker).feed(body, [fd])
    assert isinstance(message, Execute)
    for request in message.plan.new_requests:
        assert request.images == images
        np.testing.assert_array_equal(request.images[0].condition, images[0].condition)
        np.testing.assert_array_equal(request.images[0].reference, images[0].reference)


def test_checkpoints_round_trip_in_both_directions() -> None:
    arrays: dict[str, np.ndarray] = {
        "latents": np.ones((6, 4), np.float32),
        "scheduler.last_sample": np.arange(24, dtype=np.int16),
    }
    values: dict[str, CheckpointValue] = {"seed": 2**63 - 1, "timestep": 0.1, "none": None, "list": [1, "a", None]}
    checkpoint = Checkpoint(7, arrays, {"latents": "float32", "scheduler.last_sample": "bfloat16"}, values)
    with blocking_pair() as (ours, theirs):
        ours.send(Execute(StepPlan(1, [make_request("a")], ["a"], resume={"a": checkpoint}, checkpoint=["b"])))
        theirs.send(Done(StepResult(1, checkpoints={"a": checkpoint}, checkpoint_seconds=0.5)))
        execute, done = theirs.receive(), ours.receive()
    assert execute.plan.checkpoint == ["b"]
    for received in (execute.plan.resume["a"], done.result.checkpoints["a"]):
        assert (received.step, received.dtypes, received.values) == (7, checkpoint.dtypes, values)
        assert received.arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            assert received.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(received.arrays[name], array)


def test_messages_from_a_worker_round_trip() -> None:
    with blocking_pair() as (ours, theirs):
        for message in (Heartbeat(), Ready(make_ready()), Died("no", "Traceback"), Done(StepResult(4))):
            theirs.send(message)
            assert_same(ours.receive(), message)


def test_random_results_survive_any_cut() -> None:
    """Frames fed in pieces of random sizes, several frames in a piece, descriptors whenever they come."""
    for seed in range(100):
        rng = random.Random(seed)
        results = [Done(random_result(rng)) for _ in range(4)]
        stream, descriptors = b"", []
        for result in results:
            frame, fd = encode_frame(result)
            stream += frame
            descriptors += [] if fd is None else [fd]
        reader, received = FrameReader[Any](FromWorker), []
        while stream:
            size = rng.choice([1, 7, 1000, 10**6])
            received += reader.feed(stream[:size], descriptors)
            stream, descriptors = stream[size:], []
        reader.close()
        for got, sent in zip(received, results, strict=True):
            assert_same(got, sent)


async def test_big_messages_and_arrays_both_ways() -> None:
    """Far more than a socket buffer: the engine's end keeps a backlog, the worker's end waits."""
    before = num_descriptors()
    async with mixed_pair() as (ours, theirs):
        plans = [Execute(StepPlan(n, release=["x" * 3_000_000])) for n in range(3)]
        for plan in plans:
            ours.send(plan)  # nobody reads yet
        for plan in plans:
            assert await asyncio.to_thread(theirs.receive) == plan
        picture = np.random.default_rng(0).integers(0, 256, (4096, 4096, 3), dtype=np.uint8)
        result = Done(StepResult(1, images={"a": picture, "b": picture[::2, ::-1]}, advanced=["y" * 3_000_000]))
        sending = asyncio.create_task(asyncio.to_thread(theirs.send, result))
        received = await ours.receive()
        await sending
        assert_same(received, result)
        received.result.images["a"][0, 0] = 7  # its own copy
    del received
    assert num_descriptors() == before


def test_arrays_are_written_whole_however_little_a_call_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes at most 2 GiB at a time."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: write(fd, data[:1000], start))
    result = Done(StepResult(1, images={name: np.arange(3001) + n for n, name in enumerate("ab")}))
    with blocking_pair() as (ours, theirs):
        theirs.send(result)
        assert_same(ours.receive(), result)


async def test_a_channel_that_is_closed_lets_go_of_what_was_not_sent() -> None:
    before = num_descriptors()
    async with mixed_pair() as (ours, _):
        for n in range(4):  # nobody reads
            ours.send(Done(StepResult(n, images={"a": np.ones(3)}, advanced=["z" * 3_000_000])))
        assert num_descriptors() > before + 2
    assert num_descriptors() == before


async def test_arrays_go_through_the_backlog_too() -> None:
    left, right = socket.socketpair()
    with right:
        ours = AsyncChannel[Any](left, ToWorker)
        theirs = BlockingChannel[Any](right, FromWorker)
        results = [Done(StepResult(n, images={"a": np.full((50, 50), n)}, advanced=["z" * 500_000])) for n in range(8)]
        for result in results:
            ours.send(result)
        for result in results:
            assert_same(await asyncio.to_thread(theirs.receive), result)
        ours.close()


def for_each(send: Callable[[Any], None], messages: Sequence[object]) -> None:
    for message in messages:
        send(message)


def test_threads_may_send_and_receive_at_once() -> None:
    with blocking_pair() as (ours, theirs):
        rng = random.Random(0)
        results = [Done(random_result(rng)) for _ in range(50)]
        sender = threading.Thread(target=for_each, args=(theirs.send, results))
        sender.start()
        for n, result in enumerate(results):
            ours.send(Abort([str(n)]))
            assert_same(ours.receive(), result)
        sender.join()
        assert [theirs.receive() for _ in results] == [Abort([str(n)]) for n in range(50)]


def test_two_threads_may_send_at_once() -> None:
    with blocking_pair() as (ours, theirs):
        results = [Done(random_result(random.Random(seed))) for seed in range(50)]
        senders = [
            threading.Thread(target=for_each, args=(theirs.send, results)),
            threading.Thread(target=for_each, args=(theirs.send_if_free, [Heartbeat()] * 5000)),
        ]
        for sender in senders:
            sender.start()
        for result in results:
            while isinstance(message := ours.receive(), Heartbeat):
                pass
            assert_same(message, result)
        for sender in senders:
            while sender.is_alive():
                with suppress(TimeoutError):
                    ours.receive(timeout=0.01)


def test_what_is_sent_if_free_never_waits() -> None:
    with blocking_pair() as (ours, theirs):
        for _ in range(100_000):  # nobody reads
            theirs.send_if_free(Heartbeat())
        assert ours.receive() == Heartbeat()
        sending = threading.Thread(target=theirs.send, args=(Done(StepResult(1, advanced=["x" * 3_000_000])),))
        sending.start()
        while not theirs._sending.locked():
            assert sending.is_alive()
        theirs.send_if_free(Heartbeat())
        while isinstance(message := ours.receive(), Heartbeat):
            pass
        assert message.result.step_id == 1
        sending.join()
        ours.close()
        with pytest.raises(OSError, match="Broken pipe"):
            theirs.send_if_free(Heartbeat())


def test_silence_times_out_and_the_end_is_told() -> None:
    with blocking_pair() as (ours, theirs):
        with pytest.raises(TimeoutError):
            ours.receive(timeout=0.001)
        theirs.send(Done(StepResult(1)))
        theirs.close()
        assert_same(ours.receive(), Done(StepResult(1)))
        for _ in range(2):
            with pytest.raises(EOFError):
                ours.receive()
        with pytest.raises(OSError, match="Broken pipe"):
            ours.send(Abort([]))


async def test_the_end_is_told_after_the_last_message_and_loses_no_descriptor() -> None:
    before = num_descriptors()
    async with mixed_pair() as (ours, theirs):
        theirs.send(Done(StepResult(1, images={"a": np.ones(3)})))
        frame, fd = encode_frame(Done(StepResult(2, images={"a": np.ones(3)})))
        assert fd is not None
        socket.send_fds(theirs._sock, [frame[:-5]], [fd])  # dies in the middle of a message
        os.close(fd)
        theirs.close()
        ours.send(Abort([]))  # into the void
        assert (await ours.receive()).result.step_id == 1
        for _ in range(2):
            with pytest.raises(EOFError):
                await ours.receive()
        ours.send(Abort([]))
    assert num_descriptors() == before


async def test_an_end_that_goes_with_unread_mail_is_an_end() -> None:
    """The kernel reports a reset instead of an end of file."""
    async with mixed_pair() as (ours, theirs):
        ours.send(Abort(["never read"]))
        theirs.close()
        with pytest.raises(EOFError):
            await ours.receive()


async def test_who_waits_for_a_message_hears_that_it_is_wrong() -> None:
    async with mixed_pair() as (ours, theirs):
        theirs.send(Abort(["not for a worker to say"]))
        for _ in range(2):
            with pytest.raises(msgspec.ValidationError, match="Abort"):
                await ours.receive()


@pytest.mark.parametrize("num_left", [0, 1])  # the descriptor that comes, and the one that its mapping takes
async def test_arrays_for_which_no_descriptor_is_left_break_the_channel(num_left: int) -> None:
    before = num_descriptors()
    async with mixed_pair() as (ours, theirs):
        theirs.send(Done(StepResult(1, images={"a": np.ones(3)})))
        theirs.send(Done(StepResult(2, images={"a": np.ones(3)})))
        with descriptors_left(num_left):
            for _ in range(2):
                with pytest.raises(ChannelBrokenError, match="arrays of a message"):
                    await ours.receive()
    assert num_descriptors() == before


async def test_arrays_that_cannot_be_sent_break_the_channel() -> None:
    async with mixed_pair() as (ours, theirs):
        with descriptors_left(0):
            ours.send(Done(StepResult(1, images={"a": np.ones(3)})))
        ours.send(Abort([]))  # into the void
        with pytest.raises(ChannelBrokenError, match=r"cannot be sent.*Too many open files"):
            await ours.receive()
        with pytest.raises(EOFError):
            await asyncio.to_thread(theirs.receive)


async def test_a_message_to_several_workers_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []
    encode = channel.encode_frame

    def noted(message: object) -> tuple[bytes, int | None]:
        encoded.append(message)
        return encode(message)

    monkeypatch.setattr(channel, "encode_frame", noted)
    before = num_descriptors()
    async with mixed_pair() as (one, worker), mixed_pair() as (two, other), mixed_pair() as (closed, _):
        closed.close()
        message = Done(StepResult(1, images={"a": np.arange(6.0)}))
        channel.send_to_all([one, closed, two], message)
        assert encoded == [message]
        received = [await asyncio.to_thread(end.receive) for end in (worker, other)]
        received[0].result.images["a"][:] = 0  # each receiver may change its arrays
        assert_same(received[1], message)
        del received
    await until(lambda: num_descriptors() == before)  # a thread may hold a result for a moment


async def test_large_messages_are_encoded_beside_the_event_loop_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, encode = threading.Event(), channel.encode_frame

    def held(message: object) -> tuple[bytes, int | None]:
        assert encoding.wait(GUARD_SECONDS)
        return encode(message)

    monkeypatch.setattr(outbox, "encode_frame", held)
    before = num_descriptors()
    async with mixed_pair() as (one, worker), mixed_pair() as (two, other), mixed_pair() as (closed, _):
        box = outbox.Outbox([one, two, closed])
        large = Done(StepResult(1, images={"a": np.arange(6.0)}))
        box.send(Abort(["first"]))
        box.send(large, outbox.LARGE_BYTES)
        box.send(Abort(["last"]))
        box.send(large, outbox.LARGE_BYTES)
        closed.close()
        received = [await asyncio.to_thread(end.receive) for end in (worker, other)]
        assert received == [Abort(["first"])] * 2, "the event loop runs while a message is encoded"
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(worker.receive, 0)
        encoding.set()
        for end in (worker, other):
            for message in (large, Abort(["last"]), large):
                assert_same(await asyncio.to_thread(end.receive), message)
    await until(lambda: num_descriptors() == before)


async def test_a_large_message_that_cannot_be_encoded_breaks_the_channels() -> None:
    async with mixed_pair() as (ours, _):
        outbox.Outbox([ours]).send(Abort([object()]), outbox.LARGE_BYTES)  # type: ignore[list-item]
        with pytest.raises(ChannelBrokenError, match="a message holds a object"):
            await ours.receive()


async def test_a_message_that_the_kernel_refuses_breaks_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ETOOMANYREFS, "Too many references")

    async with mixed_pair() as (ours, _):
        monkeypatch.setattr(socket, "send_fds", refuse)
        ours.send(Done(StepResult(1, images={"a": np.ones(3)})))
        with pytest.raises(ChannelBrokenError, match="Too many references"):
            await ours.receive()


def test_a_message_without_its_arrays_is_lost() -> None:
    frame, fd = encode_frame(Done(StepResult(1, images={"a": np.ones(3)})))
    assert fd is not None
    os.close(fd)
    with pytest.raises(ChannelBrokenError, match="without its arrays"):
        FrameReader[Any](FromWorker).feed(frame, [])


def test_channels_on_descriptors_beyond_those_of_select() -> None:
    with low_descriptors_taken(), blocking_pair() as (ours, theirs):
        assert ours._sock.fileno() > SELECT_LIMIT
        with pytest.raises(TimeoutError):
            ours.receive(timeout=0.001)
        theirs.send_if_free(Heartbeat())
        assert ours.receive() == Heartbeat()


def test_only_what_is_declared_can_be_said() -> None:
    with pytest.raises(NotImplementedError):
        encode_frame(StepResult(1, advanced=[object()]))  # type: ignore[list-item]
    reader = FrameReader[Any](ToWorker)
    frame, _ = encode_frame(Done(StepResult(1)))
    with pytest.raises(msgspec.ValidationError):
        reader.feed(frame, [])
