"""ModelRunner: owns the model, the states of the requests and every tensor of one device."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.base import BasePipeline, RequestState
from vllm_omni.diffusion.plan import ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.diffusion.worker.contract import Place
from vllm_omni.diffusion.worker.device import Device, Stopwatch, is_out_of_memory
from vllm_omni.diffusion.worker.warmup import warm_up
from vllm_omni.diffusion.worker.weights_bar import WeightsBar
from vllm_omni.errors import InvalidRequestError

Item = TypeVar("Item")
Output = TypeVar("Output")


class ModelRunner:
    """Executes step plans. `abort` may be called from another thread; the rest belongs to one."""

    def __init__(self, config: OmniDiffusionConfig, info: ModelInfo, place: Place | None = None) -> None:
        """`place`: None for the only worker, in the engine's own process."""
        self._config = config
        self._info = info
        self._place = place or Place()
        self._device = Device()
        self._pipeline: BasePipeline[Any] | None = None
        self._requests: dict[str, DiffusionRequest] = {}
        self._states: dict[str, RequestState] = {}
        self._aborted: set[str] = set()

    @property
    def pipeline(self) -> BasePipeline[Any]:
        assert self._pipeline is not None, "start() comes first"
        return self._pipeline

    @torch.inference_mode()
    def start(self) -> WorkerReady:
        """Load the weights, run once, and measure. Raises ConfigError for a folder that cannot be served."""
        dtype = self._device.dtype(self._config.dtype)
        cls: type[BasePipeline[Any]] = import_module(
            f"vllm_omni.diffusion.models.{self._info.family}.pipeline"
        ).Pipeline
        with WeightsBar(self._info.path) as bar:
            self._pipeline = cls.load(self._config, self._info, self._device.torch, dtype, bar.update)
        rates = warm_up(self._pipeline, self._info, self._device, bar.num_bytes)
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
        )

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these in every plan executed from now on, until they are released."""
        self._aborted.update(request_ids)  # no more than a mark: `execute` may be reading the states

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. One request's fault becomes its ItemError; the others go on."""
        result = StepResult(plan.step_id)
        watch = Stopwatch(self._device)
        self._release(plan.release)
        self._requests |= {request.request_id: request for request in plan.new_requests}
        with watch.measure("encode"):
            self._encode(plan, result)
        with watch.measure("denoise"):
            clean = self._denoise(plan, result)
        with watch.measure("decode"):
            result.previews = self._decode(clean, result)
            latents = {i: self._states[i].latents for i in self._live(plan.decode) if i in self._states}
            result.images = self._decode(latents, result)
        for request_id in result.errors:
            self._drop(request_id)
        seconds = watch.seconds()
        result.encode_seconds = seconds["encode"]
        result.denoise_seconds = seconds["denoise"]
        result.decode_seconds = seconds["decode"]
        result.peak_memory_bytes = self._device.peak_memory_bytes()
        return result

    def _live(self, request_ids: Sequence[str]) -> list[str]:
        return [i for i in request_ids if i in self._requests and i not in self._aborted]

    def _release(self, request_ids: Sequence[str]) -> None:
        # The loop looks at a copy: `abort` may add to the set meanwhile.
        for request_id in [*request_ids, *self._aborted.copy()]:
            self._drop(request_id)
        self._aborted.difference_update(request_ids)

    def _drop(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        if (state := self._states.pop(request_id, None)) is not None:
            self.pipeline.forget(state)

    def _encode(self, plan: StepPlan, result: StepResult) -> None:
        requests = [self._requests[i] for i in self._live(plan.encode)]
        states = self._each(requests, lambda r: r.request_id, self.pipeline.encode, result)
        self._states |= states

    def _denoise(self, plan: StepPlan, result: StepResult) -> dict[str, Tensor]:
        """One step of each; returns the predicted clean latents that previews are asked of."""
        states = [self._states[i] for i in self._live(plan.denoise) if i in self._states]
        result.num_sequences = sum(len(s.sequence_lengths) for s in states)
        result.num_tokens = sum(sum(s.sequence_lengths) for s in states)
        velocities = self._together(states, _id_of_state, self.pipeline.predict, result)
        clean: dict[str, Tensor] = {}

        def finish(state: RequestState) -> None:
            request_id = _id_of_state(state)
            if request_id in plan.preview:
                clean[request_id] = self.pipeline.predict_clean(state, velocities[request_id])
            self.pipeline.advance(state, velocities[request_id])

        advancing = [s for s in states if _id_of_state(s) in velocities]
        result.advanced = list(self._each(advancing, _id_of_state, finish, result))
        return {i: latents for i, latents in clean.items() if i in result.advanced}

    def _decode(self, latents: dict[str, Tensor], result: StepResult) -> dict[str, Any]:
        requests = [self._requests[i] for i in latents if i in self._requests]
        return self._together(
            requests,
            lambda request: request.request_id,
            lambda batch: self.pipeline.decode(batch, [latents[request.request_id] for request in batch]),
            result,
        )

    def _together(
        self,
        items: Sequence[Item],
        id_of: Callable[[Item], str],
        run: Callable[[Sequence[Item]], Sequence[Output]],
        result: StepResult,
    ) -> dict[str, Output]:
        """All items in one go; when that fails, each alone, so that only the guilty one fails."""
        if not items:
            return {}
        if len(items) > 1:
            try:
                return {id_of(item): output for item, output in zip(items, run(items), strict=True)}
            except Exception:
                # Whatever it was, it belongs to one of the items (or to their number): the retries tell which.
                self._device.release_memory()
        return self._each(items, id_of, lambda item: run([item])[0], result)

    def _each(
        self,
        items: Sequence[Item],
        id_of: Callable[[Item], str],
        run: Callable[[Item], Output],
        result: StepResult,
    ) -> dict[str, Output]:
        outputs = {}
        for item in items:
            try:
                outputs[id_of(item)] = run(item)
            except Exception as error:
                # One request's fault, of whatever kind, must not reach its neighbours.
                result.errors[id_of(item)] = _item_error(error)
                self._device.release_memory()
        return outputs


def _id_of_state(state: RequestState) -> str:
    return state.request.request_id


def _item_error(error: Exception) -> ItemError:
    if is_out_of_memory(error):
        return ItemError("the device ran out of memory on this request", "out_of_memory", traceback.format_exc())
    kind = "invalid" if isinstance(error, InvalidRequestError) else "internal"
    return ItemError(str(error) or type(error).__name__, kind, traceback.format_exc())
