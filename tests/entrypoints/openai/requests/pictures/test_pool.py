"""Decode processes: equal pixels, limits, deaths, the order of requests, and cleanup."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from testbed.live_server import PATIENT_DECODE_LIMITS
from testbed.patience import until, wait_for
from testbed.tiny_models import photo
from tests.descriptors import descriptors_left
from tests.entrypoints.openai.requests.hostile_files import chunk, lying_exif, with_chunks
from tests.entrypoints.openai.requests.pictures.decoders import decode_pids, num_queued, num_threads
from tests.entrypoints.openai.requests.pictures.test_decoding import FILES, exif_of, mutated
from tests.entrypoints.openai.routes.test_image_edits import data_url, file_of
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.entrypoints.openai.requests.pictures.process import DecodeLimits, DecodeProcess, NoDecoderError
from vllm_omni.entrypoints.openai.requests.pictures.worker import open_image
from vllm_omni.errors import InvalidRequestError, UnavailableError
from vllm_omni.inputs.images import InputImage, ReaderSizes, prepare_image

LIMITS = PATIENT_DECODE_LIMITS
PNG = file_of(photo(61, 43, 1))


def half(width: int, height: int) -> ReaderSizes:
    return ReaderSizes((width // 2, height // 2), (width, height))


def same(width: int, height: int) -> ReaderSizes:
    return ReaderSizes((width, height), (width, height))


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    running = DecodeProcess(LIMITS)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
def decoder() -> Iterator[DecodePool]:
    with_one = DecodePool(1, LIMITS)
    with_one.start()
    try:
        yield with_one
    finally:
        with_one.close()


def pid_of(decoder: DecodePool) -> int | None:
    return next(iter(decode_pids(decoder)), None)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("name", FILES)
def test_a_process_makes_the_same_of_a_file(process: DecodeProcess, name: str) -> None:
    image, kind, options = FILES[name]
    data = file_of(image, kind, exif=exif_of(6), **options)
    for sizes_of in (half, same):
        got, expected = process.decode(data, sizes_of), prepare_image(open_image(data).decoded(), sizes_of)
        assert got == expected
        np.testing.assert_array_equal(got.condition, expected.condition)
        np.testing.assert_array_equal(got.reference, expected.reference)
        assert got.num_bytes == expected.num_bytes, "what both readers want is kept once"


def test_a_process_outlives_broken_files_and_refusals(process: DecodeProcess) -> None:
    dice, num_refused = random.Random(0), 0
    for image, kind, options in FILES.values():
        whole = file_of(image, kind, **options)
        for _ in range(60):
            try:
                process.decode(mutated(whole, dice), half)
            except InvalidRequestError:
                num_refused += 1
    assert num_refused > 200

    def none(width: int, height: int) -> ReaderSizes:
        raise InvalidRequestError(f"not {width}x{height}", param="image")

    with pytest.raises(InvalidRequestError, match="not 61x43"):
        process.decode(PNG, none)
    assert process.decode(PNG, same) == prepare_image(open_image(PNG).decoded(), same)
    assert process.is_usable


def test_a_process_is_small_and_has_nothing_of_its_parents(process: DecodeProcess) -> None:
    folder = Path(f"/proc/{process.pid}")
    assert os.getsid(process.pid) == process.pid

    def targets() -> set[str]:
        """Targets of its descriptors, except the sockets."""
        return {target for link in (folder / "fd").iterdir() if not (target := os.readlink(link)).startswith("socket:")}

    wait_for(lambda: targets() <= {"/dev/null"})  # as soon as it has let go of the picture before
    assert len(list((folder / "fd").iterdir())) <= 4
    maps = (folder / "maps").read_text()
    assert "_imaging" in maps
    assert "torch" not in maps
    process.decode(PNG, same)
    limits = {line[:25].strip(): line[25:].split()[0] for line in (folder / "limits").read_text().splitlines()}
    assert limits["Max address space"] == str(LIMITS.memory_bytes)
    assert limits["Max core file size"] == "0"
    assert LIMITS.seconds < int(limits["Max cpu time"]) < 3 * LIMITS.seconds


def test_what_takes_too_long_is_refused_and_its_process_replaced() -> None:
    """A stopped process exceeds the time limit of any picture."""
    limits = replace(LIMITS, seconds=0.3, seconds_per_megapixel=1000.0)

    async def main(decoder: DecodePool) -> None:
        await until(lambda: pid_of(decoder) is not None)
        assert isinstance(await DecodePool.file(decoder, PNG, sizes_of), InputImage)
        pid = pid_of(decoder)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(InvalidRequestError, match=r"^image takes more than 0\.3 s to decode$"):
            await decoder.file(PNG, sizes_of)
        await until(lambda: pid_of(decoder) not in (pid, None))
        assert has_ended(pid)
        assert isinstance(await decoder.file(PNG, sizes_of), InputImage)

    sizes_of = half
    decoder = DecodePool(1, limits)
    decoder.start()
    try:
        asyncio.run(main(decoder))
    finally:
        decoder.close()


def test_the_time_limit_grows_with_the_picture_and_names_it() -> None:
    limits = DecodeLimits(seconds=5.0, seconds_per_megapixel=0.25)
    assert limits.seconds_for(2_000_000) == 5.5

    def standing_still(width: int, height: int) -> ReaderSizes:
        os.kill(stopped.pid, signal.SIGSTOP)
        return same(width, height)

    stopped = DecodeProcess(DecodeLimits(seconds=0.5, seconds_per_megapixel=0.25))
    try:
        stopped.wait_until_ready()
        with pytest.raises(InvalidRequestError, match=r"^image \(PNG, 61x43\) takes more than 0\.501 s to decode$"):
            stopped.decode(PNG, standing_still)
        assert not stopped.is_usable
    finally:
        stopped.close()


def test_a_crash_is_the_senders_400() -> None:
    dying = DecodeProcess(LIMITS)
    dying.wait_until_ready()

    def kill(width: int, height: int) -> ReaderSizes:
        os.kill(dying.pid, signal.SIGSEGV)
        return same(width, height)

    try:
        with pytest.raises(
            InvalidRequestError, match=r"^image \(PNG, 61x43\) cannot be decoded: the decoder was ended by"
        ):
            dying.decode(PNG, kill)
        assert not dying.is_usable
    finally:
        dying.close()


def test_memory_is_bounded() -> None:
    """A picture that needs more memory than the limit is refused; the process lives, and takes the next picture."""
    small = DecodeProcess(replace(LIMITS, memory_bytes=256 * 2**20))
    try:
        small.wait_until_ready()
        with pytest.raises(InvalidRequestError, match="image takes more memory to decode than this server gives"):
            small.decode(file_of(Image.new("RGB", (5792, 5792)), compress_level=1), same)
        assert isinstance(small.decode(PNG, same), InputImage)
    finally:
        small.close()


async def test_a_process_that_cannot_be_started_is_a_503(tmp_path: Path) -> None:
    for python in ("/bin/false", str(tmp_path / "nothing")):
        decoder = DecodePool(1, replace(LIMITS, python=python))
        decoder.start()
        try:
            for _ in range(2):
                with pytest.raises(UnavailableError, match="has no process to decode pictures"):
                    await decoder.file(PNG, same)
        finally:
            decoder.close()
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o700)
    process = DecodeProcess(replace(LIMITS, python=str(silent), start_seconds=0.1))
    with pytest.raises(NoDecoderError, match=r"did not start in 0\.1 s"):
        process.wait_until_ready()
    process.close()
    assert has_ended(process.pid)


def test_a_server_without_descriptors_does_not_blame_the_sender() -> None:
    with descriptors_left(1), pytest.raises(NoDecoderError, match=r"cannot be started: .*Too many open files"):
        DecodeProcess(LIMITS)
    for count in (0, 1):
        process = DecodeProcess(LIMITS)
        try:
            process.wait_until_ready()
            with descriptors_left(count), pytest.raises(NoDecoderError, match="cannot be reached"):
                process.decode(PNG, same)
            assert not process.is_usable
        finally:
            process.close()


async def test_who_leaves_takes_his_picture_out_of_the_queue_and_off_the_process(decoder: DecodePool) -> None:
    await decoder.file(PNG, same)
    pid = pid_of(decoder)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    asked: list[str] = []

    def watching(name: str) -> Callable[[int, int], ReaderSizes]:
        def sizes_of(width: int, height: int) -> ReaderSizes:
            asked.append(name)
            return same(width, height)

        return sizes_of

    running, waiting, staying = (
        asyncio.create_task(decoder.file(PNG, watching(name))) for name in ("running", "waiting", "staying")
    )
    await until(lambda: num_queued(decoder) == 2)
    for task in (waiting, running):
        task.cancel()
    assert await staying == prepare_image(open_image(PNG).decoded(), same)
    assert asked == ["staying"]
    assert running.cancelled()
    assert waiting.cancelled()
    assert has_ended(pid)


class Bytes(bytearray):
    """Bytes that can be referenced weakly."""


async def test_a_file_that_nobody_waits_for_is_let_go_of(decoder: DecodePool) -> None:
    """The file is freed although its job is still in the queue."""
    await decoder.file(PNG, same)
    pid = pid_of(decoder)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    first = asyncio.create_task(decoder.file(PNG, same))
    file = Bytes(PNG)
    is_there = weakref.ref(file)
    second = asyncio.create_task(decoder.file(file, same))
    await until(lambda: decoder.num_pictures == 2)
    del file
    second.cancel()
    await asyncio.wait((second,))
    del second
    gc.collect()
    assert num_queued(decoder) >= 1
    assert is_there() is None
    first.cancel()
    await asyncio.wait((first,))


async def test_requests_take_turns(decoder: DecodePool) -> None:
    """A request sends its next picture when one is decoded: another request waits for one of them at most."""
    order: list[str] = []

    async def bring(name: str, count: int) -> None:
        for _ in range(count):
            await decoder.data_url(data_url(photo(20, 10, 1)), same)
            order.append(name)

    await asyncio.gather(bring("many", 6), bring("one", 1))
    assert order.index("one") <= 1
    assert len(order) == 7


async def test_a_process_that_died_while_idle_is_replaced_unseen(decoder: DecodePool) -> None:
    await decoder.file(PNG, same)
    pid = pid_of(decoder)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: has_ended(pid))
    assert isinstance(await decoder.file(PNG, same), InputImage)


async def test_closing_ends_what_runs(decoder: DecodePool) -> None:
    await decoder.file(PNG, same)
    pid = pid_of(decoder)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(decoder.file(PNG, same)) for _ in range(3)]
    await until(lambda: num_queued(decoder) == 2)
    decoder.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, InvalidRequestError | asyncio.CancelledError) for result in results)
    assert has_ended(pid)
    assert decode_pids(decoder) == []
    assert num_threads(decoder) == 0


def test_a_process_ends_with_its_parent() -> None:
    """A stopped process is killed too."""
    script = """
import os, signal, sys, time
from vllm_omni.entrypoints.openai.requests.pictures.process import DecodeLimits, DecodeProcess
process = DecodeProcess(DecodeLimits())
process.wait_until_ready()
os.kill(process.pid, signal.SIGSTOP)
print(process.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
        finally:
            parent.kill()
    wait_for(lambda: has_ended(pid))


def test_a_process_says_nothing(process: DecodeProcess, capfd: pytest.CaptureFixture[str]) -> None:
    process.decode(with_chunks(PNG, chunk(b"eXIf", lying_exif(65_000))), same)
    assert capfd.readouterr() == ("", "")
