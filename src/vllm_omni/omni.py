"""`AsyncOmni` (asyncio) and `Omni` (blocking): prompts in, pictures out."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import threading
import uuid
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Never, Self, Unpack

from tqdm import tqdm

from vllm_omni.diffusion.catalog.hub import HubAccess
from vllm_omni.diffusion.catalog.model_check import check_model_files
from vllm_omni.diffusion.catalog.registry import ModelInfo, load_model_info
from vllm_omni.diffusion.control.compiled_packages import check_compiled_packages
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineObserver, EngineStatus
from vllm_omni.diffusion.control.executor import make_executor
from vllm_omni.diffusion.control.executor.launch import EarlyWorkers
from vllm_omni.diffusion.control.owner import EngineOwner
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.request_builder import RequestBuilder, check_default_prompt, check_defaults
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import InvalidRequestError, RequestError, UnavailableError
from vllm_omni.foreign.constructors import explaining
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt, PromptLike, parse_prompt
from vllm_omni.inputs.foreign_calls import check_call
from vllm_omni.jobs import Job, OutputStream
from vllm_omni.keywords import OmniSettings, config_of
from vllm_omni.logs.bars import progress_bar
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.prompt_lists import (
    error_of_prompt,
    list_of_prompts,
    one_of_stages,
    params_of_prompts,
    raise_first_failure,
)

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 30.0
StageParams = OmniDiffusionSamplingParams | Iterable[OmniDiffusionSamplingParams] | None
_ELSEWHERE = {
    "start_profile": "no profiler is started by requests; output.timings has the seconds of each stage",
    "stop_profile": "no profiler is started by requests; output.timings has the seconds of each stage",
    "shutdown": "here close()",
    "engine": "it is private",
}
"""Attributes of the public vllm-omni package's classes of the same names."""


@explaining(_ELSEWHERE)
class AsyncOmni:
    """An engine for one model, on the event loop that runs `start()`: `async with AsyncOmni(model=...) as omni`.

    Made from an `OmniDiffusionConfig`, or from the model and further fields as keywords (`OmniSettings`). Raises
    ConfigError when a setting or the model is wrong. Calls on another loop or in a forked process raise
    UnavailableError. The workers end with `close()`, with the `async with` block, or when the object is dropped.
    """

    def __init__(
        self,
        config: OmniDiffusionConfig | str | os.PathLike[str] | None = None,
        *,
        observer: EngineObserver | None = None,
        early_workers: EarlyWorkers | None = None,
        **settings: Unpack[OmniSettings],
    ) -> None:
        """`config`: a config, or the model. `early_workers`: workers of `config` that run already."""
        self.config = config_of(config, settings)
        if early_workers is None:  # a command has checked before it launched workers
            check_compiled_packages()
        self.info = load_model_info(
            self.config.model, self.config.load_format, HubAccess.of(self.config), self._check_settings
        )
        for remark in () if self.info.whole is None else self.info.whole.remarks:
            logger.warning(remark)
        check_model_files(self.info, self.config)
        self.ready: WorkerReady | None = None
        self._builder: RequestBuilder | None = None
        self._engine: DiffusionEngine | Replicas
        make = partial(make_executor, self.config, self.info)
        if early_workers is not None:
            make = partial(make, early=early_workers)
        if self.config.parallel.data_parallel_size == 1:
            self._engine = DiffusionEngine(self.config, make(), observer)
        else:
            self._engine = Replicas(self.config, make, observer)
        self._jobs: dict[str, Job] = {}
        self._owner = EngineOwner()
        self._has_warned = False

    def _check_settings(self, info: ModelInfo) -> None:
        """Raise ConfigError for settings that the model does not take."""
        info.check_settings(self.config)
        info.check_parallel(self.config.parallel)
        info.check_cache(self.config.cache)
        check_defaults(self.config, info)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:  # also where the start is cancelled: no worker may stay behind
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def owner(self) -> EngineOwner:
        return self._owner

    @property
    def default_sampling_params_list(self) -> list[OmniDiffusionSamplingParams]:
        """The parameters of a request that gives none, in a list of one stage: each is the model's or server's own."""
        return [OmniDiffusionSamplingParams()]

    async def start(self) -> None:
        """Load the weights, warm up, begin to serve. Raises ConfigError or WorkerDiedError with the reason."""
        self._owner.bind(self, self._engine)
        # The tokenizer's first use imports and loads for seconds: now, and not in the first request.
        check = asyncio.to_thread(check_default_prompt, self.config, self.info)
        # Two threads that import the same libraries at once find some of them half imported; and what may be refused is
        # refused before the weights are read.
        check_first = self.config.distributed_executor_backend == "uni" or bool(self.config.default_sampling_params)
        if check_first or "negative_prompt" in self.info.default_sampling_params:
            await check
            ready = await self._engine.start()
        else:
            ready, _ = await asyncio.gather(self._engine.start(), check)
        self.ready = ready
        self._builder = RequestBuilder(self.config, self.info, ready)

    def generate(
        self,
        prompt: PromptLike,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
        *,
        sampling_params_list: StageParams = None,
        **unknown: Never,
    ) -> OutputStream:
        """Progress messages, then the output with `finished` True.

        A wrong or refused request raises a RequestError here, not in the iterator. A failure later is raised by
        the iterator. Closing the iterator early aborts the request. `sampling_params_list`: see `Omni.generate`.
        """
        check_call(unknown, ("prompt", "sampling_params", "request_id", "sampling_params_list"))
        sampling_params = one_of_stages(sampling_params, sampling_params_list)
        job = self.resolve(prompt, sampling_params, request_id)
        self.warn_of_ignored(job)
        return self.submit(job)

    def resolve(
        self,
        prompt: PromptLike,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
    ) -> Job:
        """Check a request without running it. Raises InvalidRequestError."""
        builder = self._started_builder()
        parsed = parse_prompt(prompt)
        params = OmniDiffusionSamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, OmniDiffusionSamplingParams):
            raise InvalidRequestError(
                f"sampling_params takes OmniDiffusionSamplingParams, got {params!r}", param="sampling_params"
            )
        request_id = request_id or f"omni-{uuid.uuid4().hex}"
        requests = builder.build(parsed, params, request_id)
        guides = requests[0].request.has_guidance
        ignored = "" if guides else self.info.guidance.missing_half(parsed.negative_prompt, params)
        return Job(request_id, parsed.prompt, params.output_type, requests, ignored)

    def warn_of_ignored(self, job: Job) -> None:
        """Log, once for this engine, that a request asks for guidance and gets none."""
        if job.ignored and not self._has_warned:
            self._has_warned = True
            logger.warning("there is no guidance, and this has no effect: %s (said once)", job.ignored)

    def fit_images(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> OmniPrompt:
        """See `RequestBuilder.fit_images`."""
        return self._started_builder().fit_images(prompt, params)

    def _started_builder(self) -> RequestBuilder:
        self._owner.check_process()
        if not self._owner.is_bound:
            raise UnavailableError("this AsyncOmni has not started: call `await start()`, or use `async with`")
        if self._builder is None:
            raise UnavailableError("the engine has not started", retry_after=1.0)
        return self._builder

    def submit(self, job: Job) -> OutputStream:
        """Run a resolved request. Raises QueueFullError or UnavailableError."""
        self._owner.check_loop()
        if job.request_id in self._jobs:
            raise InvalidRequestError(f"request id {job.request_id!r} is in use", param="request_id")
        events = self._engine.add(job.requests)
        self._jobs[job.request_id] = job
        return OutputStream(job, events, self._end, self._owner)

    def _end(self, job: Job) -> None:
        if self._jobs.pop(job.request_id, None) and not job.is_done:
            self._engine.abort(job.pending)

    def abort(self, request_id: str) -> None:
        """Stop a request at the next step; its iterator raises RequestAbortedError. Unknown ids are ignored."""
        self._owner.check_loop()
        if job := self._jobs.get(request_id):
            self._engine.abort(job.pending)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def begin_drain(self) -> None:
        """Refuse new requests from now on (UnavailableError)."""
        self._engine.begin_drain()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones, at most `timeout` seconds; True when all ended."""
        self._owner.check_loop()
        return await self._engine.drain(timeout)

    async def close(self) -> None:
        """Stop the workers; what still runs fails. Safe to call twice. Does nothing in a forked process."""
        if self._owner.is_bound and not self._owner.is_on_own_loop:
            self._owner.kill()
        else:
            self._owner.release()
            await self._engine.close()


@explaining(_ELSEWHERE)
class Omni:
    """`AsyncOmni` for scripts: blocking calls, a progress bar, nothing to close (but it may be, or used in `with`).

    `progress_bar=False` shows none: neither of steps, nor of a download, nor of loading weights. The other keywords
    are `AsyncOmni`'s.
    """

    def __init__(
        self, config: OmniDiffusionConfig | str | os.PathLike[str] | None = None, **settings: Unpack[OmniSettings]
    ) -> None:
        # These bounds protect a server from its clients; a script knows what it asked for.
        unbounded: OmniSettings = {
            "max_num_queued_reqs": 2**31,
            "max_queue_seconds": math.inf,
            "max_pixels": 2**31,
            "max_num_frames": 2**31,
        }
        config = config_of(config, settings, unbounded)
        self._async = AsyncOmni(config)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run_loop, args=(self._loop,), name="omni-loop", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, self._async, self._loop, thread)
        self._finalizer.atexit = False  # registered below instead, to run before the workers' own exit handlers
        try:
            self._call(self._async.start())
        except BaseException:  # also an interrupt must leave no process behind
            self.close()
            raise
        atexit.register(self._finalizer)

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        sampling_params: OmniDiffusionSamplingParams | Iterable[OmniDiffusionSamplingParams] | None = None,
        *,
        sampling_params_list: StageParams = None,
        use_tqdm: bool = True,
        **unknown: Never,
    ) -> list[OmniRequestOutput]:
        """One output a prompt, in order.

        `sampling_params`: one for all, or one each. `sampling_params_list`: in its place, those of each stage, as the
        public vllm-omni package has it; a model has one stage here. `use_tqdm=False` hides the bar of this call.

        Raises InvalidRequestError before anything runs if a request is wrong. A prompt that fails later stops no
        other: when all have ended, the first failure is raised (a RequestError). Its `index` is the number of the
        prompt, and its `outputs` are those of all prompts: a failed one has its `error` and no images.
        """
        check_call(unknown, ("prompts", "sampling_params", "sampling_params_list", "use_tqdm"))
        prompt_list = list_of_prompts(prompts)
        params_list = params_of_prompts(one_of_stages(sampling_params, sampling_params_list), len(prompt_list))
        shown = self._async.config.progress_bar and bool(use_tqdm)
        outputs: list[OmniRequestOutput] = self._call(self._generate_all(prompt_list, params_list, shown))
        raise_first_failure(outputs)
        return outputs

    async def _generate_all(
        self, prompts: list[PromptLike], params: list[Any], shows_bar: bool
    ) -> list[OmniRequestOutput]:
        jobs = []
        for index, (prompt, prompt_params) in enumerate(zip(prompts, params)):
            try:
                jobs.append(self._async.resolve(prompt, prompt_params))
            except InvalidRequestError as error:
                raise error_of_prompt(error, index, len(prompts)) from error.__cause__
            self._async.warn_of_ignored(jobs[-1])
        total = sum(r.num_steps for job in jobs for r in job.requests)
        with progress_bar(total, "denoising", shown=shows_bar, unit="step") as bar:
            return await asyncio.gather(*(_last_output(stream, bar) for stream in self._submit_all(jobs)))

    def _submit_all(self, jobs: list[Job]) -> list[OutputStream]:
        """Run all or none."""
        streams: list[OutputStream] = []
        for index, job in enumerate(jobs):
            try:
                streams.append(self._async.submit(job))
            except RequestError as error:
                for stream in streams:
                    stream.stop()
                if isinstance(error, UnavailableError):  # all prompts are refused alike
                    raise
                raise error_of_prompt(error, index, len(jobs)) from error.__cause__
        return streams

    @property
    def default_sampling_params_list(self) -> list[OmniDiffusionSamplingParams]:
        """See `AsyncOmni.default_sampling_params_list`."""
        return self._async.default_sampling_params_list

    def _call(self, coroutine: Any) -> Any:
        if self._async.owner.is_fork or not self._finalizer.alive:
            coroutine.close()
            self._async.owner.check_process()
            raise UnavailableError("this Omni was closed")
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            # An interrupt that comes just before a wait does not end it, so no wait is long.
            while not wait([future], timeout=1).done:
                pass
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: cancelling closes the streams, which aborts their requests
            raise

    def close(self) -> None:
        """Stop the workers. Happens by itself when the object goes or the program ends."""
        self._finalizer()

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _last_output(stream: OutputStream, bar: tqdm) -> OmniRequestOutput:
    """The result of a stream, or the output that holds its failure."""
    steps: dict[int, int] = {}
    try:
        async for output in stream:
            if output.finished:
                return output
            bar.update(output.step - steps.get(output.index, 0))
            steps[output.index] = output.step
    except RequestError as error:
        return stream.failure(error)
    finally:
        await stream.aclose()
    raise AssertionError("a stream ends with its result or an error")


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _close(omni: AsyncOmni) -> None:
    """Close `omni` and end the loop's other tasks: a start that was cancelled may still be stopping its workers."""
    await omni.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _shut_down(omni: AsyncOmni, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if omni.owner.is_fork:  # a fork has neither the thread nor the workers
        return

    async def close_and_stop() -> None:
        try:
            await _close(omni)
        finally:
            loop.call_soon(loop.stop)  # not at once: this coroutine's end is told by the loop

    closing = asyncio.run_coroutine_threadsafe(close_and_stop(), loop)
    if threading.current_thread() is not thread:  # the garbage collector runs on any
        closing.result(timeout=SHUTDOWN_SECONDS)
        thread.join(timeout=SHUTDOWN_SECONDS)
