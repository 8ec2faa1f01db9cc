"""A view into an DecodePool that no client has: its threads, its processes and its queue."""

from __future__ import annotations

from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool


def num_threads(decoder: DecodePool) -> int:
    return sum(thread.is_alive() for thread in decoder._threads)


def decode_pids(decoder: DecodePool) -> list[int]:
    """Ids of the processes that can decode."""
    processes = [thread.process for thread in decoder._threads]
    return [process.pid for process in processes if process is not None and process.is_usable]


def num_queued(decoder: DecodePool) -> int:
    """Pictures that no process has begun to decode."""
    num_jobs: int = decoder._jobs.qsize()
    return num_jobs
