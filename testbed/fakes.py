"""A worker without a model, for tests of whatever stands above it (no torch).

`FakeRunner` keeps the rules of a worker strictly and makes noise for pictures; `FakeExecutor` runs it inside
the event loop, at once or step by step, and fails on command. Both serve in worker processes too
(`testbed.fakes:FakeRunner`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo, WholePipeline
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.checkpoint import LATENTS, Checkpoint
from vllm_omni.diffusion.messages.plan import DecodePiece, ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import WorkerDiedError

SECONDS_PER_UNIT = 1e-4
NUM_PROMPT_TOKENS = 8
FAKE_WEIGHT_BYTES = 10**9


def as_whole(info: ModelInfo, pipeline: WholePipeline, **changes: Any) -> WholeModelInfo:
    """The same facts for a model that diffusers' `pipeline` serves, with some fields changed."""
    values = {field.name: getattr(info, field.name) for field in fields(ModelInfo)}
    return WholeModelInfo(**values | changes, pipeline=pipeline)


def make_config(**settings: Any) -> OmniDiffusionConfig:
    return OmniDiffusionConfig(**{"model": "demo", **settings})


def make_ready(**values: Any) -> WorkerReady:
    defaults: dict[str, Any] = {
        "load_seconds": 1.0,
        "load_bytes": 0,
        "device": "fake",
        "dtype": "float32",
        "max_batch_tokens": 512,
        "seconds_per_unit": SECONDS_PER_UNIT,
        "step_overhead_seconds": 0.001,
        "encode_units_per_token": 1.0,
        "decode_units_per_token": 1.0,
    }
    return WorkerReady(**{**defaults, **values})


def make_request(
    request_id: str = "r", size: int | tuple[int, int] = 64, steps: int = 4, **values: Any
) -> DiffusionRequest:
    """A request of `size` pixels (side, or height and width) with two branches."""
    height, width = size if isinstance(size, tuple) else (size, size)
    defaults: dict[str, Any] = {
        "prompt": "a red apple",
        "negative_prompt": " ",
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "true_cfg_scale": 1.0 if values.get("negative_prompt", "") is None else 4.0,
        "seed": 0,
        "max_sequence_length": 64,
        "cache": True,
    }
    return DiffusionRequest(request_id=request_id, **{**defaults, **values})


def make_scheduled(
    request_id: str = "r", size: int | tuple[int, int] = 64, steps: int = 4, **values: Any
) -> ScheduledRequest:
    """A priced request. `values`: fields of ScheduledRequest or of DiffusionRequest."""
    names = {field.name for field in fields(ScheduledRequest)}
    request = make_request(
        request_id, size, steps, **{name: value for name, value in values.items() if name not in names}
    )
    num_tokens = num_step_tokens(request)
    num_image_tokens = num_tokens // 2 - NUM_PROMPT_TOKENS
    defaults: dict[str, Any] = {
        "cost": RequestCost(
            encode=20.0,
            step=num_tokens * (1 + num_tokens / 2000),
            decode=2.0 * num_image_tokens,
            branch_tokens=(num_tokens // 2, num_tokens // 2),
        ),
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "num_image_tokens": num_image_tokens,
    }
    scheduling = {name: value for name, value in values.items() if name in names}
    return ScheduledRequest(request, **{**defaults, **scheduling})


def num_step_tokens(request: DiffusionRequest) -> int:
    """Tokens of one step: two branches, 16 pixels a token side."""
    return 2 * ((request.height // 16) * (request.width // 16) + NUM_PROMPT_TOKENS)


def fake_image(request: DiffusionRequest, step: int | None = None) -> np.ndarray:
    """uint8 [height, width, 3]: noise that depends on the seed, and for a preview on the step."""
    seed = [request.seed] if step is None else [request.seed, step]
    return np.random.default_rng(seed).integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)


def fake_video(request: DiffusionRequest) -> np.ndarray:
    """uint8 [frames, height, width, 3]: noise that depends on the seed."""
    shape = (request.num_frames, request.height, request.width, 3)
    return np.random.default_rng([request.seed]).integers(0, 256, shape, dtype=np.uint8)


def frame_index(latent_frame: int) -> int:
    """Number of the first frame that a latent frame becomes: the first one becomes 1 frame, each further one 4."""
    return max(0, 4 * latent_frame - 3)


def fake_checkpoint(request: DiffusionRequest, step: int) -> Checkpoint:
    """Checkpoint after `step` steps; its latents are noise that depends on seed and step."""
    latents = np.random.default_rng([request.seed, step]).standard_normal((4, 16), dtype=np.float32)
    return Checkpoint(step, {LATENTS: latents}, {LATENTS: "float32"}, {"seed": request.seed})


class FakeRunner:
    """Runs plans as a worker must, and asserts that the plans keep their side of the contract.

    `errors(request_id, phase, step)` may return an ItemError; phases are encode, denoise and decode.
    `cached(request_id, step)` is the part of a step that a step cache made.
    With several ranks, each one makes every step and delivers its share of the pictures.
    `image(request, step)` makes a picture, or with a step its preview.
    """

    def __init__(
        self,
        config: OmniDiffusionConfig | None = None,
        rank_info: RankInfo | None = None,
        ready: WorkerReady | None = None,
        errors: Callable[[str, str, int], ItemError | None] | None = None,
        cached: Callable[[str, int], float] | None = None,
        image: Callable[[DiffusionRequest, int | None], np.ndarray] = fake_image,
    ) -> None:
        self._image = image
        self.config = config or make_config()
        self.rank_info = rank_info or RankInfo()
        self._ready = ready or make_ready()
        self._cached = cached or (lambda request_id, step: 0.0)
        self.errors = errors or (lambda request_id, phase, step: None)
        self._states: dict[str, tuple[DiffusionRequest, int]] = {}
        self._pieces: dict[str, DecodePiece] = {}
        """Last decoded piece of each video."""
        self._encoded: dict[str, int] = {}
        """Latent frames of each conditioning video that are encoded."""
        self._dropped: set[str] = set()
        """Failed or aborted here; plans may name them until they release them."""
        self.plans: list[StepPlan] = []
        self.on_host: set[AdapterKey] = set()
        self.on_device: set[AdapterKey] = set()
        self.is_asleep = False

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        return self._ready

    @property
    def launches_ahead(self) -> bool:
        return False

    @property
    def num_states(self) -> int:
        return len(self._states)

    def holds_states_of_others(self, request_id: str) -> bool:
        """Whether other requests than this one have states here."""
        return bool(self._states.keys() - {request_id})

    def prompt_of(self, request_id: str) -> str:
        return self._states[request_id][0].prompt

    def abort(self, request_ids: Sequence[str]) -> None:
        self._dropped.update(request_ids)

    def sleep(self) -> WeightsMoved:
        assert not self.is_asleep
        self.close()
        self.is_asleep = True
        return WeightsMoved(FAKE_WEIGHT_BYTES, 0.5)

    def wake_up(self) -> WeightsMoved:
        assert self.is_asleep
        self.is_asleep = False
        return WeightsMoved(FAKE_WEIGHT_BYTES, 0.5)

    def close(self) -> None:
        for held in (self._states, self._pieces, self._encoded, self._dropped, self.on_host, self.on_device):
            held.clear()

    def read_adapter(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        assert not self.is_asleep
        self.on_host.add(key)
        assert len(self.on_host) <= self.config.num_host_loras
        report(AdapterRead(key, 0.25))

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        self.on_host.difference_update(keys)

    def _move_adapters(self, plan: StepPlan) -> None:
        """Drop adapters, and copy those of new requests to the device."""
        in_use = {lora.key for request, _ in self._states.values() for lora in request.loras}
        assert not in_use & set(plan.drop_adapters), "no request runs with what a plan drops"
        self.on_device.difference_update(plan.drop_adapters)
        self.on_device.update(plan.load_adapters)
        for request in plan.new_requests:
            keys = {lora.key for lora in request.loras}
            assert keys <= self.on_host | self.on_device, "a request begins when its adapters are read"
            self.on_device |= keys
        assert len(self.on_device) <= self.config.num_device_loras

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.execute(plan)
        return lambda: result

    def execute(self, plan: StepPlan) -> StepResult:
        assert not self.is_asleep
        items = [*plan.encode, *plan.denoise, *plan.decode]
        assert len(items) == len(set(items)), "a request has one item in a plan"
        beginning = [id for id in plan.encode if id not in plan.encode_pieces or plan.encode_pieces[id].first == 0]
        assert [request.request_id for request in plan.new_requests] == beginning
        assert set(plan.encode_pieces) <= set(plan.encode)
        assert set(plan.preview) <= set(plan.denoise)
        assert set(plan.pieces) <= set(plan.decode)
        assert set(plan.resume) <= set(beginning)
        self.plans.append(plan)
        for request_id in plan.release:
            self._states.pop(request_id, None)
            self._pieces.pop(request_id, None)
            self._encoded.pop(request_id, None)
            self._dropped.discard(request_id)
        self._move_adapters(plan)
        for request in plan.new_requests:
            assert request.request_id not in self._states
            self._states[request.request_id] = (request, self._first_step(request, plan))
        result = StepResult(plan.step_id, encode_seconds=0.001, denoise_seconds=0.002, decode_seconds=0.003)
        result.adapters = [AdapterRead(key, 0.25) for key in plan.load_adapters]
        for phase, request_ids in (("encode", plan.encode), ("denoise", plan.denoise), ("decode", plan.decode)):
            for request_id in request_ids:
                if request_id not in self._dropped:
                    self._run(request_id, phase, plan, result)
        if self.rank_info.rank == 0:
            self._save(plan, result)
        for pictures in (result.images, result.previews):  # only one rank delivers a picture
            for number, request_id in enumerate(sorted(pictures)):
                if number % self.rank_info.replica_size != self.rank_info.rank:
                    del pictures[request_id]
        return result

    def _first_step(self, request: DiffusionRequest, plan: StepPlan) -> int:
        if (checkpoint := plan.resume.get(request.request_id)) is None:
            return 0
        expected = fake_checkpoint(request, checkpoint.step)
        assert np.array_equal(checkpoint.arrays[LATENTS], expected.arrays[LATENTS]), "the checkpoint of this request"
        return checkpoint.step

    def _save(self, plan: StepPlan, result: StepResult) -> None:
        for request_id in plan.checkpoint:
            if request_id in self._states and request_id not in self._dropped:
                request, step = self._states[request_id]
                assert step > 0, "there is something to save"
                result.checkpoints[request_id] = fake_checkpoint(request, step)

    def _run(self, request_id: str, phase: str, plan: StepPlan, result: StepResult) -> None:
        request, step = self._states[request_id]
        if error := self.errors(request_id, phase, step + (phase == "denoise")):
            result.errors[request_id] = error
            self._dropped.add(request_id)
        elif phase == "encode" and (piece := plan.encode_pieces.get(request_id)) is not None:
            assert piece.first == self._encoded.get(request_id, 0) < piece.end
            self._encoded[request_id] = piece.end
        elif phase == "denoise":
            assert step < request.num_inference_steps
            if request_id in self._encoded:
                assert frame_index(self._encoded[request_id]) == request.num_frames, "the whole video is encoded"
            self._states[request_id] = (request, step + 1)
            result.advanced.append(request_id)
            if share := self._cached(request_id, step + 1):
                result.cached[request_id] = share
            result.num_sequences += 1 + request.has_guidance
            result.num_tokens += num_step_tokens(request) * (1 + request.has_guidance) // 2
            if request_id in plan.preview:
                result.previews[request_id] = self._image(request, step + 1)
        elif phase == "decode":
            assert step == request.num_inference_steps
            if request_id in plan.pieces:
                self._run_piece(request, plan.pieces[request_id], result)
            else:
                result.images[request_id] = self._image(request, None)

    def _run_piece(self, request: DiffusionRequest, piece: DecodePiece, result: StepResult) -> None:
        last = self._pieces.get(request.request_id, DecodePiece(0, 0, piece.group))
        assert (piece.first, piece.group) == (last.end, last.group), "the group that has the earlier frames goes on"
        assert frame_index(piece.first) < frame_index(piece.end) <= request.num_frames
        self._pieces[request.request_id] = piece
        if piece.group == self.rank_info.rank:
            frames = slice(frame_index(piece.first), frame_index(piece.end))
            result.frames[request.request_id] = fake_video(request)[frames]


class FakeExecutor:
    """Runs plans when they are submitted; their results come after `step_seconds`, or as `release_results` says.

    `die_at`: numbers of submitted plans, counted over all lives from 0, that kill the worker.
    `start_errors`: number of a start (from 0) -> what it raises.
    `wake_failures`: reasons for which the next calls of `wake_up` fail.
    """

    def __init__(
        self,
        runner: Callable[[], FakeRunner] = FakeRunner,
        *,
        step_seconds: float = 0.0,
        hold: bool = False,
        die_at: Container[int] = (),
        start_errors: Mapping[int, Exception] | None = None,
        wake_failures: Sequence[str] = (),
    ) -> None:
        self._make_runner = runner
        self._step_seconds = step_seconds
        self.hold = hold
        self._die_at = die_at
        self._start_errors = start_errors or {}
        self._wake_failures = list(wake_failures)
        self._results: asyncio.Queue[StepResult | WorkerDiedError] = asyncio.Queue()
        self.pending: deque[StepPlan] = deque()
        """Submitted and not begun."""
        self._num_in_flight = 0
        self._dead = True
        self.runner: FakeRunner
        self.num_starts = 0
        self.num_stops = 0
        self.num_plans = 0
        self.max_in_flight = 0
        self.aborted: list[str] = []
        self.closed = False
        self.on_adapter_read: Callable[[AdapterRead], object] = lambda read: None

    async def start(self) -> WorkerReady:
        self.num_starts += 1
        if error := self._start_errors.get(self.num_starts - 1):
            raise error
        self.runner, self._dead, self._num_in_flight = self._make_runner(), False, 0
        self._results, self.pending = asyncio.Queue(), deque()
        return self.runner.start()

    def submit(self, plan: StepPlan) -> None:
        assert self._num_in_flight < 2, "at most two plans are in flight"
        self._num_in_flight += 1
        if self._dead:
            return
        number, self.num_plans = self.num_plans, self.num_plans + 1
        self.max_in_flight = max(self.max_in_flight, self._num_in_flight)
        self.pending.append(plan)
        if number in self._die_at:
            self.die()
        elif not self.hold:
            asyncio.get_running_loop().call_later(self._step_seconds, self._run_next, self.pending)

    def release_results(self, count: int = 1) -> None:
        """With `hold`: run the next submitted plans and let their results go."""
        for _ in range(count):
            self._run_next(self.pending)

    def _run_next(self, pending: deque[StepPlan]) -> None:
        if pending is self.pending and not self._dead:
            self._results.put_nowait(self.runner.execute(pending.popleft()))

    def die(self) -> None:
        """Behave as after a kill of the worker process."""
        self._dead = True
        self._results.put_nowait(WorkerDiedError("the fake worker was told to die"))

    def abort(self, request_ids: Sequence[str]) -> None:
        assert not self._dead, "no worker to send to"
        self.aborted += request_ids
        self.runner.abort(request_ids)

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> None:
        if self._dead:
            return
        loop = asyncio.get_running_loop()
        self.runner.read_adapter(key, lambda read: loop.call_soon(self.on_adapter_read, read), kept)

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        self.runner.forget_adapters(keys)

    async def next_result(self) -> StepResult:
        result = await self._results.get()
        if isinstance(result, WorkerDiedError):
            self._results.put_nowait(result)
            raise result
        self._num_in_flight -= 1
        return result

    async def sleep(self) -> WeightsMoved:
        return self._move(self.runner.sleep)

    async def wake_up(self) -> WeightsMoved:
        if self._wake_failures:
            return WeightsMoved(0, 0.1, failure=self._wake_failures.pop(0))
        return self._move(self.runner.wake_up)

    def _move(self, move: Callable[[], WeightsMoved]) -> WeightsMoved:
        assert not self._num_in_flight, "no plan is in flight"
        if self._dead:
            raise WorkerDiedError("the fake worker was told to die")
        return move()

    async def stop(self) -> None:
        assert not self._num_in_flight or self._dead, "no plan is in flight"
        self._dead = True
        self.num_stops += 1

    async def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._dead = self.closed = True
