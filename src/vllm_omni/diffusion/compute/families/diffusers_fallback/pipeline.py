"""Whole pipelines: any pipeline class of diffusers that makes pictures or videos. A request is one call of the
pipeline, which stops after each of its steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo, WholePipeline
from vllm_omni.diffusion.compute.cache.base import NoCache
from vllm_omni.diffusion.compute.device.movable_weights import Movable, MovableWeights
from vllm_omni.diffusion.compute.device.transfers import HOST, is_host
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.diffusers_fallback.checks import FiniteCheck, is_blocked
from vllm_omni.diffusion.compute.families.diffusers_fallback.loading import load_pipeline
from vllm_omni.diffusion.compute.families.diffusers_fallback.lora import Adapters
from vllm_omni.diffusion.compute.families.diffusers_fallback.run import SteppedRun
from vllm_omni.diffusion.compute.step.finite import keep_infinite_pixels_visible
from vllm_omni.diffusion.compute.step.pipeline import Picture, Pipeline, RequestState
from vllm_omni.diffusion.compute.step.schedule import check_schedule, with_one_step_schedules, with_shift
from vllm_omni.diffusion.data import OmniDiffusionConfig, flag_of
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, InvalidRequestError, to_one_line


class PipelineCall:
    """Call of a pipeline for one request, on a copy of the pipeline that shares only weights with other calls."""

    def __init__(self, pipeline: Any, whole: WholePipeline, request: DiffusionRequest, device: torch.device) -> None:
        self.loras = request.loras
        self._device = device
        self._pipeline = copy.copy(pipeline)
        for name, component in pipeline.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(self._pipeline, name, copy.deepcopy(component))
        if request.flow_shift is not None:
            self._pipeline.scheduler = with_shift(pipeline.scheduler, request.flow_shift)
        self._pipeline.progress_bar = self._begin_steps
        self._check = FiniteCheck(self._pipeline)
        self._request = request
        self._arguments = arguments_of(request, whole)
        if whole.step_callback:
            self._arguments[whole.step_callback] = self._end_step
        if whole.step_callback == "callback":
            self._arguments["callback_steps"] = 1
        self._whole = whole
        self._num_steps: int | None = None
        """Steps as the pipeline counts them: fewer than requested with `strength`, more with some schedulers."""
        self._num_done = 0
        self._pause: Callable[[], None] = lambda: None
        self._run = SteppedRun(self._call)

    @property
    def is_alive(self) -> bool:
        return self._run.is_alive

    def encode(self) -> None:
        """Run the call up to its first step. Raises InvalidRequestError for arguments that the pipeline refuses."""
        try:
            self._run.resume()
        except InvalidRequestError:  # our own, with its `param`
            raise
        except ValueError as error:
            raise InvalidRequestError(to_one_line(str(error))) from error

    def advance(self, step: int) -> int:
        """Run the call up to the end of the planned step `step`, counted from 1. Returns the pipeline's own steps made.

        The pipeline's own steps are spread evenly over the planned ones.
        """
        before, num_steps = self._num_done, self._num_steps or self._request.num_inference_steps
        due = -(-step * num_steps // self._request.num_inference_steps)
        while self._num_done < due and self._run.resume():
            pass
        return self._num_done - before

    def picture(self) -> Picture:
        """Run the call to its end. Returns the picture or video, on the host."""
        return self._run.result()

    def cancel(self) -> None:
        self._run.cancel()

    @torch.inference_mode()
    def _call(self, pause: Callable[[], None]) -> Picture:
        self._pause = pause
        # A new thread has device 0 as its current device, where libraries put tensors without a device.
        with torch.accelerator.device_index(self._device.index), self._check.numpy_errors():
            output = self._pipeline(**self._arguments)
        (made,) = getattr(output, self._whole.output_name)
        if self._whole.makes_videos:
            pixels = np.stack([np.array(frame.convert("RGB")) for frame in made])
            if len(pixels) == self._request.num_frames == 1:  # a picture
                (pixels,) = pixels
        else:
            pixels = np.array(made.convert("RGB"))
        finite = self._check.is_finite()
        return Picture(torch.from_numpy(pixels), torch.tensor(finite), is_blocked=finite and is_blocked(output))

    def _begin_steps(self, iterable: Any = None, total: int | None = None) -> Any:
        """The pipeline's `progress_bar`, which the call makes right before its first step."""
        if self._num_steps is None:
            # Not every pipeline has `_num_timesteps`, but each gives its bar a length.
            counted = getattr(self._pipeline, "_num_timesteps", None)
            self._num_steps = counted or (len(iterable) if total is None else total)
            check_schedule(getattr(self._pipeline, "scheduler", None), self._request)
            if not self._num_steps and self._request.strength is not None:
                raise InvalidRequestError(
                    f"strength {self._request.strength} of {self._request.num_inference_steps} steps leaves no step",
                    param="strength",
                )
            self._pause()
        if not self._whole.step_callback:
            return StepBar(iterable, total, self._count_step)
        return tqdm(iterable, total=total, disable=True)

    def _end_step(self, *told: Any) -> dict[str, Any]:
        """Step callback; changes nothing. told: its arguments, at the end the latents or a mapping with them."""
        self._check.see_latents(told[-1].get("latents") if isinstance(told[-1], dict) else told[-1])
        self._count_step()
        return {}

    def _count_step(self) -> None:
        self._num_done += 1
        self._pause()


class StepBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Hidden progress bar that calls `on_step` after each step, for pipelines without a step callback."""

    def __init__(self, iterable: Any, total: int | None, on_step: Callable[[], object]) -> None:
        super().__init__(iterable, total=total, disable=True)
        self._on_step = on_step

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self._on_step()

    def update(self, n: float | None = 1) -> bool | None:
        self._on_step()
        return None


def arguments_of(request: DiffusionRequest, whole: WholePipeline) -> dict[str, Any]:
    """Arguments of a pipeline's call: parameters that the request sets. For others the call has defaults."""
    values = {whole.fps_name if name == "fps" else name: getattr(request, name) for name in whole.parameters}
    arguments = {name: value for name, value in values.items() if value is not None}
    if "sigmas" in arguments:
        arguments["sigmas"] = list(arguments["sigmas"])
    if whole.takes_max_area:
        arguments["max_area"] = request.height * request.width
    if whole.declines_binning:
        arguments["use_resolution_binning"] = False
    if pictures := [Image.fromarray(image.reference) for image in request.images]:
        arguments["image"] = pictures if whole.takes_image_list else pictures[0]
    generator = torch.Generator(HOST).manual_seed(request.seed)
    return arguments | {"prompt": request.prompt, "generator": generator, "output_type": "pil"}


@dataclass(eq=False)
class WholeState(RequestState):
    """State of a request in a whole pipeline. `latents` is empty: the call holds them."""

    call: PipelineCall | None = None


class DiffusersPipeline(Pipeline[WholeState]):
    """Loaded pipeline of diffusers. A step of a request is a step of its call; requests of one plan run in turn."""

    def __init__(self, pipeline: Any, info: WholeModelInfo, adapters: Adapters, device: torch.device) -> None:
        self.pipeline = pipeline
        self._device = device
        self._adapters = adapters
        self._info = info
        self._count_tokens = lru_cache(64)(info.count_prompt_tokens)  # pictures of one call have one prompt
        self.step_cache = NoCache(Group.alone())  # never used
        self._calls: dict[str, PipelineCall] = {}
        # A paused call would keep the weights until the process ends.
        weakref.finalize(self, _cancel_all, self._calls).atexit = False
        self._nothing = torch.empty(0)

    @classmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: WholeModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> DiffusersPipeline:
        for name in ("enable_cpu_offload", "enable_layerwise_offload"):
            if getattr(config, name) and is_host(device):
                raise ConfigError(f"{flag_of(name)} needs a GPU to bring the weights to, this machine has none")
        pipeline = load_pipeline(info.path, info.pipeline.class_name, dtype, config.variant)
        modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
        on_bytes(sum(parameter.nbytes for module in modules for parameter in module.parameters()))
        _configure_vae(pipeline, config)
        for name, component in pipeline.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(pipeline, name, with_one_step_schedules(component))
        if config.enable_cpu_offload:
            pipeline.enable_model_cpu_offload(device=device)
        elif config.enable_layerwise_offload:
            pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=True)
        else:
            pipeline.to(device)
        return cls(pipeline, info, Adapters(pipeline), device)

    def encode(self, request: DiffusionRequest) -> WholeState:
        self._give_turn(request)
        branch_tokens = self._branch_tokens(request)
        call = PipelineCall(self.pipeline, self._info.pipeline, request, self._device)
        self._calls[request.request_id] = call
        try:
            call.encode()
        except Exception:  # the runner reports it; a call that did not begin is dropped
            del self._calls[request.request_id]
            raise
        return WholeState(request, self._nothing, branch_tokens, call=call)

    def _branch_tokens(self, request: DiffusionRequest) -> tuple[int, ...]:
        info, num_seen = self._info, self._info.count_image_prompt_tokens(request.images)
        prompts = (request.prompt, request.negative_prompt)[: 1 + request.has_guidance]
        return info.branch_tokens(
            [num_seen + (0 if prompt is None else self._count_tokens(prompt)) for prompt in prompts],
            info.num_image_tokens(request.height, request.width, request.num_frames),
            sum(map(info.num_reference_tokens, request.images)),
        )

    def predict(self, states: Sequence[WholeState], groups: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        """An empty tensor for each branch: the pipeline's step is one piece, made in `advance`."""
        return [(state.latents,) * len(state.sequence_lengths) for state in states]

    def advance(self, state: WholeState, branches: Sequence[Tensor], previews: bool = False) -> None:
        """Run the call to the end of the next planned step. The model gives no previews."""
        assert state.call is not None
        self._give_turn(state.request)
        state.num_made = state.call.advance(state.step + 1)
        state.step += 1

    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        pictures = []
        for request in requests:
            self._give_turn(request)
            picture = self._calls[request.request_id].picture()
            _check_made(request, picture.pixels)
            pictures.append(picture)
        return pictures

    def forget(self, state: WholeState) -> None:
        if (call := self._calls.pop(state.request.request_id, None)) is not None:
            call.cancel()

    def release_memory(self) -> None:
        self._adapters.drop_all_but({lora.key for call in self._calls.values() for lora in call.loras})

    def drop_caches(self) -> None:
        self._adapters.drop_all_but(())

    def movable_weights(self) -> list[Movable]:
        components = self.pipeline.components.values()
        modules = [component for component in components if isinstance(component, nn.Module)]
        return [MovableWeights([module], self._device) for module in modules]

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> int:
        return self._adapters.read(key, kept)

    def forget_adapters(self, keys: Iterable[AdapterKey]) -> None:
        self._adapters.forget(keys)

    def load_adapter(self, key: AdapterKey) -> None:
        self._adapters.load(key)

    def drop_adapters(self, keys: Iterable[AdapterKey]) -> None:
        self._adapters.drop(keys)

    def _give_turn(self, request: DiffusionRequest) -> None:
        """Activate the request's adapters: calls share the models, and an adapter changes the models."""
        self._adapters.use(request.loras)


def _check_made(request: DiffusionRequest, pixels: Tensor) -> None:
    """Raise InvalidRequestError for a size or a number of frames that the pipeline has rounded."""
    *frames, height, width, _ = pixels.shape
    if (height, width) != (request.height, request.width):
        made, asked = f"{width}x{height}", f"{request.width}x{request.height}"
        raise InvalidRequestError(f"the pipeline makes {made} of size {asked}", param="size")
    if frames and frames != [request.num_frames]:
        raise InvalidRequestError(
            f"the pipeline makes {frames[0]} frames of num_frames {request.num_frames}", param="num_frames"
        )


def _cancel_all(calls: dict[str, PipelineCall]) -> None:
    while calls:
        calls.popitem()[1].cancel()


def _configure_vae(pipeline: Any, config: OmniDiffusionConfig) -> None:
    """Set up the model's VAE. Raises ConfigError for a setting that it does not have."""
    vae = getattr(pipeline, "vae", None)
    if isinstance(decoder := getattr(vae, "decoder", None), nn.Module):
        keep_infinite_pixels_visible(decoder)
    for flag, wanted, name in (
        ("--vae-use-slicing", config.vae_use_slicing, "enable_slicing"),
        ("--vae-use-tiling", config.vae_use_tiling, "enable_tiling"),
    ):
        if wanted and not hasattr(vae, name):
            raise ConfigError(f"{flag}: this model's VAE, {type(vae).__name__}, cannot do it")
        if wanted:
            getattr(vae, name)()
