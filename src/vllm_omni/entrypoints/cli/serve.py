"""Server process of `vllm serve MODEL --omni`: listens, runs the engine, drains and ends."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from uvicorn.loops.auto import auto_loop_factory

from vllm_omni.diffusion.control.events import Observers
from vllm_omni.diffusion.control.executor.launch import EarlyWorkers
from vllm_omni.entrypoints import vllm_api
from vllm_omni.entrypoints.cli.args import ServeArgs, changed_video_flags
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.entrypoints.server.activity import ActivityLog
from vllm_omni.entrypoints.server.connections import Acceptor, RefusedConnection, max_connections
from vllm_omni.entrypoints.server.http_protocol import HttpProtocol
from vllm_omni.entrypoints.server.listening_socket import ListeningSocket
from vllm_omni.entrypoints.server.middleware import add_middleware, api_keys
from vllm_omni.entrypoints.server.signals import StopSignals
from vllm_omni.errors import ConfigError, OmniError
from vllm_omni.logs import QueuedStreams
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.observer import VideoObserver

if TYPE_CHECKING:
    from vllm_omni.video_jobs.service import VideoJobs

logger = logging.getLogger(__name__)

FAILED_EXIT_CODE = 1
KEEP_ALIVE_SECONDS = 75
"""Seconds that an idle connection stays open: longer than clients and proxies keep it (60 s and less)."""
FLUSH_SECONDS = 4
"""Seconds that finished responses have to be sent when the server stops."""
MAX_TIMER_SECONDS = 1e9
"""Longest `--shutdown-timeout` for the kill timer, whose clock cannot count much longer."""
WATCH_SECONDS = 0.5
"""Interval at which the engine's state is checked."""
MAX_OPEN_FILES = 65535


@dataclass(frozen=True)
class StopLimits:
    """Time limits of the phases of a stop after `--shutdown-timeout`, in seconds."""

    close_seconds: float = 10.0
    """Limit for stopping the workers; workers that need longer are killed with this process."""
    http_seconds: float = FLUSH_SECONDS + 0.5
    """Limit for the HTTP server: FLUSH_SECONDS, and half a second until uvicorn notices the stop."""
    log_seconds: float = 0.5
    """Time for the last log lines. After all limits the process is killed."""

    def total(self, shutdown_timeout: float) -> float:
        return shutdown_timeout + self.close_seconds + self.http_seconds + self.log_seconds


def serve(
    args: ServeArgs,
    signals: StopSignals,
    streams: QueuedStreams,
    workers: EarlyWorkers | None = None,
    limits: StopLimits = StopLimits(),
) -> int:
    """Serve until a signal or a failure; return the exit code. Raises ConfigError before any weight is read.

    `workers`: worker processes that run already; None: the engine starts its own. Tasks may still run on the event
    loop, which is not closed: the caller ends the process.
    """
    _raise_file_limit()
    metrics, activity = PrometheusObserver(args.settings.served_model_names[0]), ActivityLog()
    metrics.watch_log(lambda: streams.num_dropped)
    # Works without the event loop and the interpreter's lock: prints where threads hang and ends the process.
    start_kill_timer = partial(
        faulthandler.dump_traceback_later, limits.total(min(args.http.shutdown_timeout, MAX_TIMER_SECONDS)), exit=True
    )

    async def run(listener: ListeningSocket) -> int:
        omni = AsyncOmni(args.config, observer=Observers(metrics, activity), early_workers=workers)
        activity.watch(omni.status)
        folder, requires_key = vllm_api.swagger_ui_folder(), bool(api_keys(args.http))
        settings = replace(args.settings, swagger_ui_folder=folder, requires_api_key=requires_key)
        jobs = _video_jobs(omni, args, metrics)
        app = build_app(omni, settings, metrics, jobs=jobs)
        add_middleware(app, args.http)
        server = _http_server(app, args.http)
        return await Service(omni, server, listener, args, signals, start_kill_timer, limits, jobs).run()

    # The socket first: a port in use is an error at once, not after the weights are read.
    with ListeningSocket(args.http) as listener:
        signals.before_end(listener.close)
        return asyncio.Runner(loop_factory=auto_loop_factory()).run(run(listener))


def _video_jobs(omni: AsyncOmni, args: ServeArgs, observer: VideoObserver) -> VideoJobs | None:
    """Video jobs of a model that makes videos. Raises ConfigError, before any weight is read, for wrong stores."""
    if not omni.info.makes_videos:
        if flags := changed_video_flags(args.videos):
            logger.warning("Without effect on a model that makes pictures, ignored: %s", ", ".join(flags))
        return None
    # Here, because a server for pictures needs neither databases nor encoders of videos.
    from vllm_omni.video_jobs.service import VideoJobs, check_stores

    check_stores(args.videos)
    return VideoJobs(omni, args.videos, args.settings.served_model_names[0], observer)


def _raise_file_limit() -> None:
    """Raise the limit of open files: each connection is one, and the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn's server, with our signal handling and our acceptor of connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise OmniError("the HTTP server's startup failed; the log lines above say why")
        state, tls = self.server_state, self.config.ssl

        def make_protocol(is_welcome: bool) -> asyncio.Protocol:
            kind: Any = self.config.http_protocol_class if is_welcome else RefusedConnection
            protocol: asyncio.Protocol = kind(self.config, state, self.lifespan.state)
            return protocol

        most = max_connections()
        self.servers: list[Any] = [
            Acceptor(listener, make_protocol, lambda: len(state.connections), tls, most=most)
            for listener in sockets or ()
        ]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(app: FastAPI, http: HttpOptions) -> uvicorn.Server:
    """Server for `app`. Raises ConfigError for certificates and ciphers that cannot be used."""
    quiet_paths = list(http.disable_access_log_for_endpoints)
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        log_level=http.uvicorn_log_level,
        log_config=vllm_api.log_config(quiet_paths, http.uvicorn_log_level),
        access_log=not http.disable_uvicorn_access_log,
        ssl_keyfile=http.ssl_keyfile,
        ssl_certfile=http.ssl_certfile,
        ssl_ca_certs=http.ssl_ca_certs,
        ssl_cert_reqs=http.ssl_cert_reqs,
        ssl_ciphers=http.ssl_ciphers or "TLSv1",  # uvicorn's default
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        forwarded_allow_ips="*" if "*" in http.forwarded_allow_ips else list(http.forwarded_allow_ips) or None,
        server_header=False,
        ws="none",
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        given = {name: getattr(http, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers")}
        named = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value)
        raise ConfigError(f"{named}: cannot be used for TLS: {error}") from error
    return _Server(config)


@dataclass(eq=False)
class Service:
    """One engine and one HTTP server, from start to exit code.

    The HTTP server answers from the start (503 until the engine is ready), so that probes see a live process. The first
    SIGTERM or SIGINT drains; the second ends the process at once: see StopSignals.
    """

    _omni: AsyncOmni
    _server: uvicorn.Server
    _listener: ListeningSocket
    _args: ServeArgs
    _signals: StopSignals
    _start_kill_timer: Callable[[], object]
    """Called at the first signal; ends the process after all limits."""
    _limits: StopLimits
    _jobs: VideoJobs | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> int:
        self._signals.on_first(partial(self._on_signal, asyncio.get_running_loop()))
        http = asyncio.create_task(self._server.serve(sockets=[self._listener.socket]))
        engine = asyncio.create_task(self._run_engine())
        refresher = (
            vllm_api.start_certificate_refresher(self._server.config) if self._args.http.enable_ssl_refresh else None
        )
        logger.info("Listening on %s", self._listener.address)
        if ignored := self._args.ignored_flags:
            logger.warning("Without effect on a diffusion model, ignored (see docs/flags.md): %s", ", ".join(ignored))
        try:
            await _first_of(self._stop.wait(), http, engine)
            if self._stop.is_set():
                await _first_of(self._drain(), http, engine)
            return self._failure(engine) if engine.done() or http.done() else 0
        finally:
            engine.cancel()
            if refresher:
                refresher.stop()
            await self._close(http)

    async def _run_engine(self) -> None:
        """Start the engine and watch its state; never returns, raises when the engine fails."""
        await self._omni.start()
        ready = self._omni.ready
        assert ready is not None
        logger.info(
            "Ready: %s (%s, %s, %s, %.1f MB of weights in %.1f s) at %s",
            self._args.settings.served_model_names[0],
            self._omni.info.served_by,
            ready.device,
            ready.dtype,
            ready.load_bytes / 1e6,
            ready.load_seconds,
            self._listener.address,
        )
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if (status := self._omni.status()).state == "failed":
                raise OmniError(status.failure)

    def _failure(self, engine: asyncio.Task[None]) -> int:
        """Log why the engine or the HTTP server ended by itself; return the exit code, or raise the error."""
        error = engine.exception() if engine.done() else OmniError("the HTTP server stopped")
        assert error is not None
        if isinstance(error, ConfigError) or not isinstance(error, OmniError):
            raise error  # main prints a ConfigError in one line; any other error is a bug
        reason, _, details = str(error).partition("\n")
        if details:
            logger.error("%s", details)
        logger.error("Stopping: %s", reason)
        return FAILED_EXIT_CODE

    def _on_signal(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        """Begin to stop. Runs in a signal handler, between any two bytecodes of the main thread."""
        jobs = "" if self._jobs is None else ", storing video jobs and giving them back"
        logger.info("%s: refusing new requests, finishing what runs%s (a second signal ends at once)", name, jobs)
        self._start_kill_timer()
        loop.call_soon_threadsafe(self._stop.set)

    async def _drain(self) -> None:
        timeout = self._args.http.shutdown_timeout
        if self._omni.ready is None:
            return  # still loading: nothing runs
        self._omni.begin_drain()
        # Pictures are finished, while video jobs go back to the store with checkpoints of their newest steps.
        giving_back = asyncio.create_task(self._jobs.drain(timeout)) if self._jobs is not None else None
        if not await self._omni.drain(timeout):
            logger.warning("--shutdown-timeout: aborting what still runs after %g s", timeout)
        if giving_back is not None:
            await giving_back  # files of videos are written after the engine's part

    async def _close(self, http: asyncio.Task[None]) -> None:
        """Stop the workers, which fails running requests; send finished responses; stop listening."""
        if self._jobs is not None:
            self._jobs.begin_drain()  # streams of events end also if the engine failed, or was still loading
        closing = asyncio.create_task(self._omni.close())
        await _first_of(closing, asyncio.sleep(self._limits.close_seconds))
        if closing.done():
            closing.result()
        else:
            closing.cancel()
            logger.error("Workers did not stop within %g s; they end with this process", self._limits.close_seconds)
        self._server.should_exit = True
        await _first_of(http, asyncio.sleep(self._limits.http_seconds))
        if http.done():
            http.result()


async def _first_of(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of `awaitables` is done, then cancel the other coroutines; tasks go on."""
    tasks = [a if isinstance(a, asyncio.Task) else asyncio.create_task(a) for a in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, given in zip(tasks, awaitables):
            if task is not given:
                task.cancel()
