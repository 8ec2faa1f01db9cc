"""A view into an ImageDecoder that no client has: its threads, its processes and its queue."""

from __future__ import annotations

from vllm_omni.entrypoints.openai.requests.pictures.pool import ImageDecoder


def num_threads(decoder: ImageDecoder) -> int:
    return sum(thread.is_alive() for thread in decoder._threads)


def decode_pids(decoder: ImageDecoder) -> list[int]:
    """Ids of the processes that can decode."""
    processes = [thread.process for thread in decoder._threads]
    return [process.pid for process in processes if process is not None and process.is_usable]


def num_queued(decoder: ImageDecoder) -> int:
    """Pictures that no process has begun to decode."""
    return decoder._jobs.qsize()
