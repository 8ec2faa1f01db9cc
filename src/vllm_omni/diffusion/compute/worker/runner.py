"""ModelRunner: owns the model, the states of the requests and every tensor of one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.registry import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import PeerFailedError, Ranks, RanksLostError, connect
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.timing import Stopwatch
from vllm_omni.diffusion.compute.startup.attention_choice import choose_attention
from vllm_omni.diffusion.compute.startup.compiling import compile_variants, run_variants
from vllm_omni.diffusion.compute.startup.kernel_check import check_kernels
from vllm_omni.diffusion.compute.startup.warmup import Rates, warm_up, warm_up_whole
from vllm_omni.diffusion.compute.step.finite import is_finite
from vllm_omni.diffusion.compute.step.pipeline import BasePipeline, Picture, RequestState
from vllm_omni.diffusion.compute.weights.progress import WeightsBar
from vllm_omni.diffusion.compute.worker.item_errors import item_error, not_finite_error
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError, InvalidRequestError, ModerationBlockedError

CACHE_SHARE = 0.25
"""Of the memory that is free after the warm-up, what step caches may keep; what does not fit is a miss."""

Item = TypeVar("Item")
Output = TypeVar("Output")


@dataclass(frozen=True)
class CheckedPicture:
    """A decoded picture on the device."""

    request: DiffusionRequest
    pixels: Tensor
    finite: Tensor
    """Bool [2]: whether the latents of its request's state are numbers, and whether its pixels are."""


@dataclass(frozen=True)
class DownloadedPicture:
    """A decoded picture on the host, with the flags of its `CheckedPicture`."""

    request: DiffusionRequest
    pixels: np.ndarray
    has_finite_latents: bool
    has_finite_pixels: bool


class ModelRunner:
    """Executes step plans. `abort` may be called from another thread; so may what `launch` returns; the rest belongs to
    one."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        info: ModelInfo,
        place: RankInfo | None = None,
        compile_blocks: bool | None = None,
    ) -> None:
        """`place`: which rank of its replica this is; None: the only one. `compile_blocks`: whether the transformer's
        blocks run compiled; None: where the device is worth it, unless the config enforces eager."""
        self._config = config
        self._info = info
        self._place = place or RankInfo()
        self._device = Device(config.device, self._place.device_index)
        self._dtype = self._device.dtype(config.dtype)
        self._decodes = self._device.stream(separate=config.overlap_decode)
        self._compile_blocks = compile_blocks
        self._ranks = Ranks()
        self._pipeline: BasePipeline[Any] | None = None
        self._requests: dict[str, DiffusionRequest] = {}
        self._states: dict[str, RequestState] = {}
        self._aborted: set[str] = set()
        self._failed_elsewhere: list[str] = []
        self._lacks_memory = False
        """Whether the other ranks are to be asked to drop with this one what can be made again."""

    @property
    def pipeline(self) -> BasePipeline[Any]:
        assert self._pipeline is not None, "start() comes first"
        return self._pipeline

    @property
    def launches_ahead(self) -> bool:
        return self._device.is_asynchronous

    @torch.inference_mode()
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        """Load the weights, run once, and measure. Raises ConfigError for a folder that cannot be served.

        first: choices of an earlier start that a restart keeps, because they change pixels: the attention backend, the
        CPU threads (they order sums) and the memory of step caches (it decides which steps are skipped).
        """
        dtype = self._dtype
        backend = None if first is None else first.attention_backend
        num_threads = None if first is None else first.num_threads
        if self._config.quantization == "fp8":
            self._device.check_float8(dtype)
        if self._config.overlap_decode:
            self._device.check_overlap()
        self._config = replace(self._config, kernels=self._device.choose_kernels(self._config.kernels))
        if (num_processes := self._config.parallel.world_size) > 1:
            self._device.share_machine(num_processes)
        if self._place.replica_size > 1:
            self._ranks = Ranks(connect(self._config.parallel, self._place, self._device))
        if (whole := self._info.whole) is None:
            check_kernels(self._config.kernels, self._device, dtype)
            attention = choose_attention(self._config, self._info, self._device, dtype, self._ranks, backend)
            self._config = replace(self._config, attention_backend=attention)
        cls: type[BasePipeline[Any]] = import_module(
            f"vllm_omni.diffusion.compute.families.{self._info.family}.pipeline"
        ).Pipeline
        shown = self._config.progress_bar and self._place.device_index == 0
        with WeightsBar(self._info.path, shown) as bar:
            self._pipeline = cls.load(self._config, self._info, self._device.torch, dtype, bar.update, self._ranks.mesh)
        self._device.end_loading()
        if whole is None:
            rates = self._warm_up(self._pipeline, bar.num_bytes, num_threads)
        else:
            rates = self._try_whole(bar.num_bytes, num_threads)
        cache_bytes = int(CACHE_SHARE * self._device.free_memory_bytes()) if first is None else first.cache_bytes
        self._pipeline.step_cache.budget.max_bytes = cache_bytes
        return WorkerReady(
            load_seconds=bar.seconds,
            load_bytes=bar.num_bytes,
            device=self._device.name,
            dtype=str(dtype).removeprefix("torch."),
            max_batch_tokens=self._config.max_batch_tokens or rates.max_batch_tokens,
            seconds_per_unit=rates.seconds_per_unit,
            step_overhead_seconds=rates.step_overhead_seconds,
            encode_units_per_token=rates.encode_units_per_token,
            decode_units_per_token=rates.decode_units_per_token,
            peak_memory_bytes=self._device.peak_memory_bytes(),
            attention_backend=self._config.attention_backend,
            # A step of a whole pipeline gains nothing from company, and an abort would wait for all of it.
            max_num_seqs=None if whole is None else 1,
            max_running=None if whole is None else whole.max_running,
            num_threads=self._device.num_threads,
            cache_bytes=cache_bytes,
        )

    def _warm_up(self, pipeline: BasePipeline[Any], model_bytes: int, num_threads: int | None) -> Rates:
        """Raises ConfigError where steps cannot be compiled, or recorded, as the config asks for."""
        if not self._config.enforce_eager:
            pipeline.capturer = self._ranks.capturer(self._device)
        variants = None
        if self._compiles(type(pipeline)):
            variants = compile_variants
        elif self._config.kernels == "triton":  # whose kernels are compiled at their first run
            variants = run_variants
        rates = warm_up(pipeline, self._info, self._device, model_bytes, self._ranks, variants, num_threads)
        if (capturer := pipeline.capturer) is not None and capturer.failure is not None:
            raise ConfigError(
                f"steps cannot be captured as CUDA graphs here: {capturer.failure}; --enforce-eager serves without"
            )
        return rates

    def _try_whole(self, model_bytes: int, num_threads: int | None) -> Rates:
        """Rates of a whole pipeline. Raises ConfigError for one that does not make what its signature promises."""
        defaults = {**self._info.default_sampling_params, **self._config.default_sampling_params}
        info = replace(self._info, default_sampling_params=defaults)
        return warm_up_whole(self.pipeline, info, self._device, model_bytes, num_threads)

    def _compiles(self, cls: type[BasePipeline[Any]]) -> bool:
        """Whether blocks run compiled."""
        if self._compile_blocks is not None:
            return self._compile_blocks
        is_worth_it = self._device.is_worth_compiling_for and cls.gains_from_compiling(self._config)
        return is_worth_it and not self._config.enforce_eager

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these in every plan executed from now on, until they are released."""
        self._aborted.update(request_ids)  # no more than a mark: `execute` may be reading the states

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Run one step, together with the other ranks. One request's fault becomes its ItemError; the others go on.

        Returns when the device has been given all of it. What is returned waits until it is done.
        """
        result = StepResult(plan.step_id)
        watch = Stopwatch(self._device.torch)
        self._release(plan.release)
        self._requests |= {request.request_id: request for request in plan.new_requests}
        live = self._agree(plan)
        with watch.measure("encode"):
            self._encode([i for i in plan.encode if i in live], result)
        with watch.measure("denoise"):
            clean = self._denoise([i for i in plan.denoise if i in live], plan, result)
        latents = {i: self._states[i].latents for i in plan.decode if i in live}
        inputs = [*clean.values(), *latents.values(), *(self._states[i].latents for i in clean)]
        with self._decodes.after(inputs), watch.measure("decode"):
            previews, images = (self._download(self._decode(x, result)) for x in (clean, latents))
        for request_id in [*result.errors, *self._failed_elsewhere]:
            self._drop(request_id)
        self._failed_elsewhere.clear()
        result.cache_bytes = self.pipeline.step_cache.budget.num_bytes
        result.sent_bytes = self._ranks.take_sent_bytes()
        result.peak_memory_bytes = self._device.peak_memory_bytes()

        def wait() -> StepResult:
            self._take_previews(previews(), result)
            self._take_images(images(), result)
            seconds = watch.seconds()
            result.encode_seconds = seconds["encode"]
            result.denoise_seconds = seconds["denoise"]
            result.decode_seconds = seconds["decode"]
            return result

        return wait

    def _agree(self, plan: StepPlan) -> set[str]:
        """The requests of the plan that no rank skips: an abort reaches the ranks one after another, and a request may
        have failed on one of them alone."""
        ids = [*plan.encode, *plan.denoise, *plan.decode]
        known = [i in self._requests and (i in self._states or i in plan.encode) for i in ids]
        votes = [not k or i in self._aborted for i, k in zip(ids, known)]
        *skipped, lacks_memory = self._ranks.unite([*votes, self._lacks_memory])
        if lacks_memory:
            self._lacks_memory = False
            self.pipeline.release_memory()
            self._device.release_memory()
        return {i for i, skip in zip(ids, skipped, strict=True) if not skip}

    def _release(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._drop(request_id)
        self._aborted.difference_update(request_ids)

    def _drop(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        if (state := self._states.pop(request_id, None)) is not None:
            self.pipeline.forget(state)

    def _encode(self, request_ids: Sequence[str], result: StepResult) -> None:
        requests = [self._requests[i] for i in request_ids]
        mesh = self._ranks.mesh
        together = mesh.tensor.size > 1 or mesh.text_encoder.size > 1
        self._states |= self._each(requests, lambda r: r.request_id, self.pipeline.encode, result, together)

    def _denoise(self, request_ids: Sequence[str], plan: StepPlan, result: StepResult) -> dict[str, Tensor]:
        """One step of each; returns the predicted clean latents that previews are asked of."""
        states = [self._states[i] for i in request_ids]

        def predict(batch: Sequence[RequestState]) -> list[tuple[Tensor, ...]]:
            groups = [g for s in batch for g in plan.placement.get(_id_of_state(s), [0] * len(s.sequence_lengths))]
            return self.pipeline.predict(batch, groups)

        branches = self._together(states, _id_of_state, predict, result, self._ranks.size > 1)
        computed = {_id_of_state(s): s.sequence_lengths[: len(branches.get(_id_of_state(s), ()))] for s in states}
        result.num_sequences = sum(len(lengths) for lengths in computed.values())
        result.num_tokens = sum(sum(lengths) for lengths in computed.values())
        clean: dict[str, Tensor] = {}

        def finish(state: RequestState) -> None:
            request_id = _id_of_state(state)
            velocity = self.pipeline.combine(state, branches[request_id])
            if request_id in plan.preview:
                clean[request_id] = self.pipeline.predict_clean(state, velocity)
            self.pipeline.advance(state, velocity)
            if state.num_made != 1:
                result.made[request_id] = state.num_made
            if (skipped := state.settle()) and self._ranks.mesh.rank_group.rank == 0:
                result.cached[request_id] = skipped / len(branches[request_id])

        advancing = [s for s in states if _id_of_state(s) in branches]
        result.advanced = list(self._each(advancing, _id_of_state, finish, result, together=False))
        return {i: latents for i, latents in clean.items() if i in result.advanced}

    def _decode(self, latents: dict[str, Tensor], result: StepResult) -> dict[str, CheckedPicture]:
        """Decodes are dealt to the ranks, or to the groups of ranks that share one; each returns what it made.

        The check of the latents is that of the request's state, of which `latents` may be a prediction.
        """
        mesh = self._ranks.mesh
        num_groups = mesh.world.size // mesh.vae.size
        mine = list(latents)[mesh.world.rank // mesh.vae.size :: num_groups]

        def decode(batch: Sequence[DiffusionRequest]) -> Sequence[CheckedPicture | None]:
            ids = [request.request_id for request in batch]
            pictures: Sequence[Picture] = self.pipeline.decode(batch, [latents[i] for i in ids])
            if any(picture.is_blocked for picture in pictures):
                raise ModerationBlockedError("the model's safety checker blocked the picture")
            if not pictures:  # another rank of the group has them
                return [None] * len(batch)
            finite = [torch.stack((is_finite(self._states[i].latents), p.is_finite)) for i, p in zip(ids, pictures)]
            return [CheckedPicture(r, p.pixels, flags) for r, p, flags in zip(batch, pictures, finite, strict=True)]

        requests = [self._requests[i] for i in mine]
        decoded = self._together(requests, lambda request: request.request_id, decode, result, mesh.vae.size > 1)
        return {request_id: picture for request_id, picture in decoded.items() if picture is not None}

    def _download(self, pictures: Mapping[str, CheckedPicture]) -> Callable[[], dict[str, DownloadedPicture]]:
        """Begin to copy pictures with their flags; the call that is returned waits for the copies."""
        arrays = self._device.download(
            {f"pixels {i}": picture.pixels for i, picture in pictures.items()}
            | {f"finite {i}": picture.finite for i, picture in pictures.items()}
        )

        def downloaded() -> dict[str, DownloadedPicture]:
            values = arrays()
            return {
                i: DownloadedPicture(picture.request, values[f"pixels {i}"], *map(bool, values[f"finite {i}"]))
                for i, picture in pictures.items()
            }

        return downloaded

    def _take_images(self, pictures: Mapping[str, DownloadedPicture], result: StepResult) -> None:
        """A picture is the result only if all its values were numbers; otherwise its request fails."""
        for request_id, picture in pictures.items():
            if picture.has_finite_latents and picture.has_finite_pixels:
                result.images[request_id] = picture.pixels
            else:
                result.errors[request_id] = not_finite_error(picture.request, self._info, self._dtype)

    def _take_previews(self, pictures: Mapping[str, DownloadedPicture], result: StepResult) -> None:
        """Latents that are not finite never become finite again, so their request fails now and not at its end. A
        prediction alone may be beyond the VAE's range: it is skipped, and the picture is checked when it is done."""
        for request_id, picture in pictures.items():
            if not picture.has_finite_latents:
                result.errors[request_id] = not_finite_error(picture.request, self._info, self._dtype)
            elif picture.has_finite_pixels:
                result.previews[request_id] = picture.pixels

    def _together(
        self,
        items: Sequence[Item],
        id_of: Callable[[Item], str],
        run: Callable[[Sequence[Item]], Sequence[Output]],
        result: StepResult,
        together: bool,
    ) -> dict[str, Output]:
        """All items in one go; when that fails, each alone, so that only the guilty one fails."""
        if not items:
            return {}
        if len(items) > 1:
            try:
                outputs = self._run(lambda: run(items), together)
                return {id_of(item): output for item, output in zip(items, outputs, strict=True)}
            except RanksLostError:
                raise
            except Exception as error:
                # Whatever it was, it belongs to one of the items (or to their number): the retries tell which.
                self._release_memory(error)
        return self._each(items, id_of, lambda item: run([item])[0], result, together)

    def _each(
        self,
        items: Sequence[Item],
        id_of: Callable[[Item], str],
        run: Callable[[Item], Output],
        result: StepResult,
        together: bool,
    ) -> dict[str, Output]:
        outputs = {}
        for item in items:
            try:
                outputs[id_of(item)] = self._run(partial(run, item), together)
            except RanksLostError:
                raise
            except PeerFailedError:
                self._failed_elsewhere.append(id_of(item))
            except Exception as error:
                # One request's fault, of whatever kind, must not reach its neighbours.
                result.errors[id_of(item)] = item_error(error)
                self._release_memory(error)
        return outputs

    def _release_memory(self, error: Exception) -> None:
        """After a failure, which may have been a lack of it."""
        if not isinstance(error, InvalidRequestError):
            if self._ranks.size == 1:
                self.pipeline.release_memory()
            else:  # what several have recorded they drop together, or one would record alone
                self._lacks_memory = True
        self._device.release_memory()

    def _run(self, run: Callable[[], Output], together: bool) -> Output:
        return self._ranks.attempt(run) if together else run()


def _id_of_state(state: RequestState) -> str:
    return state.request.request_id
