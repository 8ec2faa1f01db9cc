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
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Never, Self, Unpack

from vllm_omni.diffusion.catalog.hub import HubAccess
from vllm_omni.diffusion.catalog.model_check import check_model_files
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control import default_checks
from vllm_omni.diffusion.control.adapter_loading import AdapterLoading
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import default_adapters
from vllm_omni.diffusion.control.compiled_packages import check_compiled_packages
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineObserver, EngineStatus
from vllm_omni.diffusion.control.executor import make_executor
from vllm_omni.diffusion.control.executor.launch import EarlyWorkers
from vllm_omni.diffusion.control.owner import EngineOwner
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.request_builder import CheckedPrompt, RequestBuilder
from vllm_omni.diffusion.control.resuming import with_checkpoints
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import InvalidRequestError, RequestError, RequestGivenBackError, UnavailableError
from vllm_omni.foreign.class_decorators import explain_attributes
from vllm_omni.inputs.adapters import AdapterState, AdapterStats
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, PromptLike, own_adapter, parse_prompt
from vllm_omni.inputs.generate_keywords import check_call
from vllm_omni.jobs import Job, OutputStream, last_output
from vllm_omni.logs.bars import progress_bar
from vllm_omni.loop_thread import end_loop, result_of, run_loop
from vllm_omni.omni_settings import OmniSettings, make_config
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.prompt_lists import (
    params_per_prompt,
    prompt_error,
    raise_first_failure,
    single_stage_params,
    to_prompt_list,
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
"""Attributes that only the public vllm-omni package's classes have -> what to use here."""


@explain_attributes(_ELSEWHERE)
class AsyncOmni:
    """Engine for one model, on the event loop that runs `start()`: `async with AsyncOmni(model=...) as omni`.

    Takes an `OmniDiffusionConfig`, or the model and further fields as keywords (`OmniSettings`). Raises ConfigError
    when a setting or the model is wrong. Calls on another loop or in a forked process raise UnavailableError. The
    workers end with `close()`, with the `async with` block, or when the object is garbage-collected.
    """

    def __init__(
        self,
        config: OmniDiffusionConfig | str | os.PathLike[str] | None = None,
        *,
        observer: EngineObserver | None = None,
        early_workers: EarlyWorkers | None = None,
        **settings: Unpack[OmniSettings],
    ) -> None:
        """`config`: a config, or the model. `early_workers`: workers that were started for `config` before."""
        self.config = make_config(config, settings)
        if early_workers is None:  # otherwise the command checked before it launched them
            check_compiled_packages()
        self.info = load_model_info(
            self.config.model, self.config.load_format, HubAccess.of(self.config), self._check_settings
        )
        config, remarks = default_checks.with_fitting_adapters(self.config, self.info)
        self.config = config.with_adapter_files()
        self.adapters = AdapterRegistry(self.config)
        """Adapters that requests may name."""
        for remark in (*self.info.remarks, *remarks):
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
        self._loading = AdapterLoading(self.adapters, self.info, self._engine, default_adapters(self.config))
        self._jobs: dict[str, Job] = {}
        self.owner = EngineOwner()
        self._has_warned = False

    def _check_settings(self, info: ModelInfo) -> None:
        """Raise ConfigError for settings that the model does not take."""
        info.check_settings(self.config)
        info.check_parallel(self.config.parallel)
        default_checks.check_defaults(default_checks.with_fitting_adapters(self.config, info)[0], info)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:  # also a cancellation: no worker may stay behind
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def default_sampling_params_list(self) -> list[OmniDiffusionSamplingParams]:
        """Parameters of a request that gives none, in a list of one stage: all None, which means the defaults."""
        return [OmniDiffusionSamplingParams()]

    async def start(self) -> None:
        """Load the weights, warm up and accept requests. Raises ConfigError or WorkerDiedError with the reason."""
        self.owner.bind(self, self._engine)
        # The first use of the tokenizer takes seconds of imports and loading: spend them now, not in the first request.
        check = asyncio.to_thread(default_checks.check_default_prompt, self.config, self.info)
        # With `uni`, loading in another thread imports the same libraries, and some break when two threads import them
        # at once. Default parameters may be refused: check them before the weights are read.
        settings = self.config.default_sampling_params or self.config.lora_defaults
        check_first = self.config.distributed_executor_backend == "uni" or bool(settings)
        if check_first or "negative_prompt" in self.info.default_sampling_params:
            await check
            ready = await self._engine.start()
        else:
            ready, _ = await asyncio.gather(self._engine.start(), check)
        await self._loading.load_served()
        self.ready = ready
        self._builder = RequestBuilder(self.config, self.info, ready, self.adapters)

    def generate(
        self,
        prompt: PromptLike,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
        *,
        sampling_params_list: StageParams = None,
        resume: Checkpoint | None = None,
        checkpoint_seconds: float | None = None,
        **unknown: Never,
    ) -> OutputStream:
        """Iterator over progress messages and, last, the output with `finished` True.

        A wrong or refused request raises a RequestError here; a later failure is raised by the iterator. Closing the
        iterator early aborts the request. `sampling_params_list`: see `Omni.generate`.

        checkpoint_seconds: device seconds of an output's denoising steps between two checkpoints, which come as
        progress messages; a worker's death then repeats only the steps since the last one. None: no checkpoints.
        resume: checkpoint of the same prompt and parameters, the seed included, to go on from; for one output.
        """
        taken = ("prompt", "sampling_params", "request_id", "sampling_params_list", "resume", "checkpoint_seconds")
        check_call(unknown, taken)
        sampling_params = single_stage_params(sampling_params, sampling_params_list)
        job = self.make_job(prompt, sampling_params, request_id, resume=resume, checkpoint_seconds=checkpoint_seconds)
        self.warn_ignored(job)
        return self.submit(job)

    def make_job(
        self,
        prompt: PromptLike,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
        *,
        resume: Checkpoint | None = None,
        checkpoint_seconds: float | None = None,
    ) -> Job:
        """Check a call and turn it into a job, without running it; see `generate`. Raises InvalidRequestError."""
        checked = self.check(prompt, sampling_params)
        return self.make_checked_job(checked, request_id, resume=resume, checkpoint_seconds=checkpoint_seconds)

    def check(self, prompt: PromptLike, sampling_params: OmniDiffusionSamplingParams | None = None) -> CheckedPrompt:
        """First part of `make_job`, for callers that run it in another thread: see `RequestBuilder.check`."""
        builder = self._started_builder()
        parsed = parse_prompt(prompt)
        params = OmniDiffusionSamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, OmniDiffusionSamplingParams):
            raise InvalidRequestError(
                f"sampling_params takes OmniDiffusionSamplingParams, got {params!r}", param="sampling_params"
            )
        return builder.check(parsed, params)

    def make_checked_job(
        self,
        checked: CheckedPrompt,
        request_id: str | None = None,
        *,
        resume: Checkpoint | None = None,
        checkpoint_seconds: float | None = None,
    ) -> Job:
        """Second part of `make_job`: count tokens, and make requests with a price."""
        request_id = request_id or f"omni-{uuid.uuid4().hex}"
        requests = self._started_builder().build_checked(checked, request_id)
        requests = with_checkpoints(requests, self.info, resume, checkpoint_seconds)
        guides = requests[0].request.has_guidance
        prompt, given = checked.prompt, checked.given
        ignored = "" if guides else self.info.guidance.missing_half(prompt.negative_prompt, given)
        return Job(request_id, prompt.prompt, given.output_type, requests, ignored)

    def warn_ignored(self, job: Job) -> None:
        """Log, once for this engine, that a job asks for guidance but lacks the other half of its settings."""
        if job.ignored and not self._has_warned:
            self._has_warned = True
            logger.warning("there is no guidance, and this has no effect: %s (said once)", job.ignored)

    def _started_builder(self) -> RequestBuilder:
        self.owner.check_process()
        if not self.owner.is_bound:
            raise UnavailableError("this AsyncOmni has not started: call `await start()`, or use `async with`")
        if self._builder is None:
            raise UnavailableError("the engine has not started", retry_after=1.0)
        return self._builder

    def submit(self, job: Job) -> OutputStream:
        """Queue the requests of a job. Raises QueueFullError or UnavailableError."""
        self.owner.check_loop()
        if job.request_id in self._jobs:
            raise InvalidRequestError(f"request id {job.request_id!r} is in use", param="request_id")
        events = self._engine.add(job.requests)
        self._jobs[job.request_id] = job
        return OutputStream(job, events, self._end, self.owner)

    def _end(self, job: Job) -> None:
        if self._jobs.pop(job.request_id, None) and not job.is_done:
            self._engine.abort(job.pending)

    def abort(self, request_id: str) -> None:
        """Stop a request at the next step; its iterator raises RequestAbortedError. Unknown ids are ignored."""
        self.owner.check_loop()
        if job := self._jobs.get(request_id):
            self._engine.abort(job.pending)

    def give_back(self, request_id: str) -> None:
        """Stop a request as `abort` does, for a video job that goes back to its store: nobody has given it up."""
        self.owner.check_loop()
        if job := self._jobs.get(request_id):
            self._engine.abort(job.pending, RequestGivenBackError("its video job goes back to the store"))

    def request_checkpoint(self, request_id: str) -> None:
        """Ask for a checkpoint of each unfinished output of a request, as it is after the step that runs.

        Each answer is a progress message with `checkpointed`. Where no step can be saved it comes at once; its
        `checkpoint` is then the newest one, or None. Unknown ids are ignored.
        """
        self.owner.check_loop()
        if job := self._jobs.get(request_id):
            self._engine.request_checkpoint(job.pending)

    async def load_lora(
        self, request: LoRARequest, defaults: Mapping[str, Any] | None = None, replace: bool = False
    ) -> None:
        """Serve another adapter: see `AdapterLoading.load`. Requests that run go on. Raises InvalidRequestError."""
        tokenizing = self._started_builder().tokenizing
        self.owner.check_loop()
        request = own_adapter(request)
        check = partial(default_checks.check_loaded_recipe, request.name, defaults or {}, self.config, self.info)
        recipe = await asyncio.to_thread(check, tokenizing)
        await self._loading.load(request, recipe, replace)

    async def unload_lora(self, name: str) -> None:
        """Stop serving an adapter: see `AdapterLoading.unload`. Raises InvalidRequestError."""
        self._started_builder()
        self.owner.check_loop()
        await self._loading.unload(name)

    def adapter_stats(self) -> AdapterStats:
        """Numbers of adapters by state, and of loads and evictions since the start."""
        return self._loading.stats()

    def adapter_states(self) -> Mapping[str, AdapterState]:
        """State of each served adapter, by name."""
        return self._loading.states()

    async def sleep(self, level: int = 1) -> int:
        """Free the devices until `wake_up`. Returns the level reached, which may be deeper.

        level: 1 moves the weights to host memory; 2 ends the workers, so that waking reads the weights again.
        Requests that have begun are replayed after waking; new ones raise UnavailableError. Calls of `sleep` and
        `wake_up` run one after another. Raises InvalidRequestError, and UnavailableError unless requests are accepted.
        """
        self.owner.check_loop()
        return await self._engine.sleep(level)

    async def wake_up(self) -> None:
        """End a sleep. Raises UnavailableError, and sleeps on, where devices lack memory or no worker starts."""
        self.owner.check_loop()
        await self._engine.wake_up()

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps, or is on its way there or back."""
        return self.status().state == "sleeping"

    def status(self) -> EngineStatus:
        return self._engine.status()

    def eta_seconds(self, job: Job) -> float:
        """Estimated time until `job`, which was submitted or is about to be, is done."""
        return self._engine.eta_seconds(job.requests)

    def work_seconds(self, job: Job) -> float:
        """Estimated time that `job` takes when nothing else runs."""
        return self._engine.work_seconds(job.requests)

    def begin_drain(self) -> None:
        """Refuse new requests from now on (UnavailableError)."""
        self._engine.begin_drain()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones, at most `timeout` seconds; True when all ended."""
        self.owner.check_loop()
        return await self._engine.drain(timeout)

    async def close(self) -> None:
        """Stop the workers; what still runs fails. Safe to call twice. Does nothing in a forked process."""
        if self.owner.is_bound and not self.owner.is_on_own_loop:
            self.owner.kill()
        else:
            self.owner.release()
            await self._engine.close()


@explain_attributes(_ELSEWHERE)
class Omni:
    """`AsyncOmni` for scripts: blocking calls and a progress bar; `close()` and `with` are optional.

    `progress_bar=False` hides all bars: of steps, of downloads and of loading weights. The other keywords are
    `AsyncOmni`'s.
    """

    def __init__(
        self, config: OmniDiffusionConfig | str | os.PathLike[str] | None = None, **settings: Unpack[OmniSettings]
    ) -> None:
        # These limits protect a server from its clients; a script needs no protection from itself.
        unbounded: OmniSettings = {
            "max_num_queued_reqs": 2**31,
            "max_queue_seconds": math.inf,
            "max_pixels": 2**31,
            "max_num_frames": 2**31,
        }
        config = make_config(config, settings, unbounded)
        self._async = AsyncOmni(config)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=run_loop, args=(self._loop,), name="omni-loop", daemon=True)
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
        """One output for each prompt, in order.

        `sampling_params`: one for all prompts, or a list with one for each. `sampling_params_list`: the same for
        scripts of the public vllm-omni package, which has parameters for each stage; here a model has one stage.
        `use_tqdm=False` hides the bar of this call.

        Raises InvalidRequestError before anything runs if a request is wrong. A prompt that fails later does not stop
        the others: when all have ended, the first failure is raised (a RequestError). Its `index` is the number of the
        prompt, and its `outputs` are the outputs of all prompts: a failed one has its `error` and no images.
        """
        check_call(unknown, ("prompts", "sampling_params", "sampling_params_list", "use_tqdm"))
        prompt_list = to_prompt_list(prompts)
        params_list = params_per_prompt(single_stage_params(sampling_params, sampling_params_list), len(prompt_list))
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
                jobs.append(self._async.make_job(prompt, prompt_params))
            except InvalidRequestError as error:
                raise prompt_error(error, index, len(prompts)) from error.__cause__
            self._async.warn_ignored(jobs[-1])
        requests = [request for job in jobs for request in job.requests]
        num_frames = sum(r.request.num_frames for r in requests if r.num_latent_frames > 1)
        with (
            progress_bar(sum(r.num_steps for r in requests), "denoising", shown=shows_bar, unit="step") as steps,
            progress_bar(num_frames, "decoding", shown=shows_bar and num_frames > 0, unit="frame") as frames,
        ):
            return await asyncio.gather(*(last_output(stream, steps, frames) for stream in self._submit_all(jobs)))

    def _submit_all(self, jobs: list[Job]) -> list[OutputStream]:
        """Queue all jobs; if one is refused, abort the others and raise its error."""
        streams: list[OutputStream] = []
        for index, job in enumerate(jobs):
            try:
                streams.append(self._async.submit(job))
            except RequestError as error:
                for stream in streams:
                    stream.stop()
                if isinstance(error, UnavailableError):  # all prompts are refused alike
                    raise
                raise prompt_error(error, index, len(jobs)) from error.__cause__
        return streams

    @property
    def default_sampling_params_list(self) -> list[OmniDiffusionSamplingParams]:
        """See `AsyncOmni.default_sampling_params_list`."""
        return self._async.default_sampling_params_list

    @property
    def adapters(self) -> AdapterRegistry:
        """Adapters that prompts may name."""
        return self._async.adapters

    def load_lora(
        self,
        request: LoRARequest | str,
        path: str | os.PathLike[str] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        """Serve another adapter, given as a LoRARequest or by name and path: see `AsyncOmni.load_lora`."""
        if isinstance(request, str):
            request = LoRARequest(request, path)
        elif path is not None:
            raise InvalidRequestError("load_lora takes a LoRARequest, or a name and a path", param="path")
        self._call(self._async.load_lora(request, defaults, replace))

    def unload_lora(self, name: str) -> None:
        """Stop serving an adapter: see `AsyncOmni.unload_lora`."""
        self._call(self._async.unload_lora(name))

    def adapter_stats(self) -> AdapterStats:
        """See `AsyncOmni.adapter_stats`."""
        return self._async.adapter_stats()

    def sleep(self, level: int = 1) -> int:
        """See `AsyncOmni.sleep`."""
        return int(self._call(self._async.sleep(level)))

    def wake_up(self) -> None:
        """See `AsyncOmni.wake_up`."""
        self._call(self._async.wake_up())

    def is_sleeping(self) -> bool:
        """See `AsyncOmni.is_sleeping`."""
        return self._async.status().state == "sleeping"

    def _call(self, coroutine: Any) -> Any:
        if self._async.owner.is_fork or not self._finalizer.alive:
            coroutine.close()
            self._async.owner.check_process()
            raise UnavailableError("this Omni was closed")
        return result_of(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def close(self) -> None:
        """Stop the workers. Also called when the object is garbage-collected and when the program ends."""
        self._finalizer()

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shut_down(omni: AsyncOmni, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if not omni.owner.is_fork:  # a fork has neither the thread nor the workers
        end_loop(omni.close, loop, thread, SHUTDOWN_SECONDS)
