"""ModelRunner: owner of the model, the request states and all tensors of one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks, RanksLostError, connect
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.timing import Stopwatch
from vllm_omni.diffusion.compute.distributed.groups import PeerFailedError
from vllm_omni.diffusion.compute.memory.check import check_memory
from vllm_omni.diffusion.compute.startup.model_start import StartOptions, check_device, start_model
from vllm_omni.diffusion.compute.step.finite import is_finite
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, Picture, Pipeline, RequestState
from vllm_omni.diffusion.compute.worker.adapter_reads import AdapterReads
from vllm_omni.diffusion.compute.worker.checkpoints import download_checkpoints
from vllm_omni.diffusion.compute.worker.decoded_pictures import CheckedPicture, DownloadedPicture, take, take_previews
from vllm_omni.diffusion.compute.worker.item_errors import item_error, not_finite_error
from vllm_omni.diffusion.compute.worker.sleeper import Sleeper
from vllm_omni.diffusion.compute.worker.tiled_requests import TiledRequests
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.plan import DecodePiece, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import InvalidRequestError, ModerationBlockedError

Item = TypeVar("Item", DiffusionRequest, RequestState)
Output = TypeVar("Output")
Attempt = Callable[[Callable[[], Any]], Any]
"""Calls work of one or several requests, on this rank or on several together."""


class ModelRunner:
    """Executes step plans.

    All calls come from one thread, except `abort`, `read_adapter`, `forget_adapters` and the call that `launch`
    returns, which may come from others.
    """

    def __init__(
        self,
        config: OmniDiffusionConfig,
        info: ModelInfo,
        rank_info: RankInfo | None = None,
        options: StartOptions = StartOptions(),  # noqa: B008 - frozen
    ) -> None:
        """rank_info: the rank of this worker; None: the only rank of its replica."""
        self._config = config
        self._info = info
        self._rank_info = rank_info or RankInfo()
        self._options = options
        self._device = Device(config.device, self._rank_info.device_index, config.gpu_memory_utilization)
        self._dtype = self._device.dtype(config.dtype)
        self._decode_stream = self._device.stream(separate=config.overlap_decode)
        self.ranks = Ranks()
        """The ranks of the replica; `start` connects them."""
        self._pipeline: Pipeline[Any] | None = None
        self._sleeper = Sleeper(self._device)
        self._requests: dict[str, DiffusionRequest] = {}
        self._states: dict[str, RequestState] = {}
        self._skipped: set[str] = set()
        """Requests that were aborted, or failed here while other ranks go on with them; skipped until released."""
        self._failed: list[str] = []
        """Requests that failed in the plan that runs, as all ranks know."""
        self._tiled = TiledRequests()
        self._lacks_memory = False
        """Whether to ask the other ranks, in the next step, to free with this one what can be made again."""

    @property
    def pipeline(self) -> Pipeline[Any]:
        assert self._pipeline is not None, "start() comes first"
        return self._pipeline

    @property
    def _adapters(self) -> AdapterReads:
        return AdapterReads(self.pipeline)

    @property
    def states(self) -> Mapping[str, RequestState]:
        """States of the requests that have begun, by id."""
        return self._states

    @property
    def launches_ahead(self) -> bool:
        return self._device.is_asynchronous

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        """Meet the other ranks, then load and warm up the model: see `start_model` for `first` and the errors."""
        check_device(self._config, self._device)
        if (num_processes := self._config.parallel.world_size) > 1:
            self._device.share_machine(num_processes)
        if self._rank_info.replica_size > 1:
            config = self._config
            self.ranks = Ranks(connect(config.parallel, self._rank_info, self._device, config.weight_sharding))
        if first is None:
            check_memory(self._config, self._info, self._device, self.ranks)
        pipeline, ready = start_model(
            self._config,
            self._info,
            self._device,
            self.ranks,
            first,
            self._options,
            shows_progress=self._rank_info.device_index == 0,
        )
        self._pipeline = pipeline
        return ready

    @torch.inference_mode()
    def sleep(self) -> WeightsMoved:
        """Drop all requests, and move the weights to host memory; see `Sleeper`."""
        self._forget_requests()
        return self._sleeper.sleep(self.pipeline)

    @torch.inference_mode()
    def wake_up(self) -> WeightsMoved:
        """Move the weights back to the device, together with the other ranks; see `Sleeper`."""
        return self._sleeper.wake_up(self.ranks)

    def close(self) -> None:
        """Free the device's memory. The runner is of no use afterwards."""
        self._forget_requests()
        self._pipeline, self._sleeper = None, Sleeper(self._device)
        self._device.free_everything()

    def _forget_requests(self) -> None:
        for request_id in list(self._requests):
            self._drop(request_id)
        self._skipped.clear()

    def read_adapter(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        """Begin to read an adapter into host memory; a thread reads it and calls `report`."""
        self._adapters.begin_read(key, report, kept)

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        """Drop adapters from host memory. Any thread may call this."""
        self.pipeline.forget_adapters(keys)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these requests in every later plan, until they are released."""
        self._skipped.update(request_ids)  # `launch` in the other thread may be reading the states: leave them alone

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its end."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch one step, together with the other ranks. An error of one request becomes its ItemError; others go on.

        Returns when all work is launched on the device. The returned call waits for the end and gives the result.
        """
        result = StepResult(plan.step_id)
        watch = Stopwatch(self._device.torch)
        self._release(plan.release)
        self.pipeline.drop_adapters(plan.drop_adapters)
        result.adapters = [self._adapters.load(key) for key in plan.load_adapters]
        self._requests |= {request.request_id: request for request in plan.new_requests}
        self._check(plan, result)
        live = self._agree_on_requests(plan, result)
        with watch.measure("encode"):
            self._encode_early(plan.encode_early)
            self._encode([i for i in plan.encode if i in live], plan, result)
            self._resume(plan, result)
        with watch.measure("denoise"):
            clean = self._denoise([i for i in plan.denoise if i in live], plan, result)
        take_checkpoints = self._checkpoints(plan, result)
        decoding = [i for i in plan.decode if i in live]
        whole = {i: self._states[i].latents for i in decoding if i not in plan.pieces}
        pieces = {i: plan.pieces[i] for i in decoding if i in plan.pieces}
        inputs = [*clean.values(), *(self._states[i].latents for i in (*clean, *decoding))]
        with self._decode_stream.after(inputs), watch.measure("decode"):
            previews = self._download(self._decode(clean, self.pipeline.decode_preview, result))
            images = self._download(self._decode(whole, self.pipeline.decode, result))
            frames = self._download(self._decode_pieces(pieces, result))
        for request_id in self._failed:
            self._drop(request_id)
        self._failed.clear()
        result.cache_bytes = self.pipeline.step_cache.budget.num_bytes
        result.sent_bytes = self.ranks.take_sent_bytes()
        result.peak_memory_bytes = self._device.peak_memory_bytes()

        def wait() -> StepResult:
            take_checkpoints()
            failed = take_previews(previews(), result.previews)
            failed |= take(images(), result.images) | take(frames(), result.frames)
            for request_id, request in failed.items():  # now instead of at their end
                result.errors[request_id] = not_finite_error(request, self._info, self._dtype)
            seconds = watch.seconds()
            result.encode_seconds = seconds["encode"]
            result.denoise_seconds = seconds["denoise"]
            result.decode_seconds = seconds["decode"]
            return result

        return wait

    def _check(self, plan: StepPlan, result: StepResult) -> None:
        """Give an error to each new request that cannot run, before the ranks agree on those that they encode."""
        new = [request for request in plan.new_requests if request.request_id not in self._skipped]
        self._run_each(new, self.pipeline.check, result, run_alone)

    def _agree_on_requests(self, plan: StepPlan, result: StepResult) -> set[str]:
        """Requests of the plan that no rank skips. result: holds the errors that this rank has found.

        Ranks may skip different ones: an abort reaches them at different times, and a request may fail on one rank.
        """
        ids = [*plan.encode, *plan.denoise, *plan.decode]
        known = [i in self._requests and (i in self._states or i in plan.encode) for i in ids]
        votes = [not k or i in self._skipped or i in result.errors for i, k in zip(ids, known)]
        *skipped, lacks_memory = self.ranks.unite([*votes, self._lacks_memory])
        if lacks_memory:
            self._lacks_memory = False
            self.pipeline.release_memory()
            self._device.release_memory()
        return {i for i, skip in zip(ids, skipped, strict=True) if not skip}

    def _release(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._drop(request_id)
        self._skipped.difference_update(request_ids)

    def _drop(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._tiled.forget(request_id)
        if (state := self._states.pop(request_id, None)) is not None:
            self.pipeline.forget(state)
        self.pipeline.release(request_id)

    def _encode_early(self, requests: Sequence[DiffusionRequest]) -> None:
        """Fill the caches of prompts and pictures. Errors are reported by the encode, which meets them again."""
        ignored = StepResult(0)
        attempt = self._together(self._ranks_share_encodes)
        skipped = set(self._skipped)
        for encode in self.pipeline.early_encodes:
            self._run_each(requests, encode, ignored, attempt)
        # Nothing of these requests is kept, so nothing ends.
        early = {request.request_id for request in requests}
        self._failed = [i for i in self._failed if i not in early]
        self._skipped -= early - skipped

    def _encode(self, request_ids: Sequence[str], plan: StepPlan, result: StepResult) -> None:
        """Encode whole requests, and pieces of conditioning videos; the first piece comes after the rest of a request.

        A piece that fails on one rank cannot be repeated: the others skip its request in the next plan.
        """
        begins = {request.request_id: request for request in plan.new_requests if request.request_id in request_ids}
        # Before the first attempt, which may end at different places on different ranks.
        for request in begins.values():
            self.pipeline.admit(request)

        pipeline = self.pipeline
        if isinstance(pipeline, PackedPipeline) and pipeline.turns.is_on:
            self._encode_early(list(begins.values()))  # all prompts in one turn of the text encoder

        def encode(request: DiffusionRequest) -> RequestState:
            if request.request_id not in plan.encode_pieces:
                return cast(RequestState, pipeline.encode(request))
            assert isinstance(pipeline, PackedPipeline)
            return cast(RequestState, pipeline.begin_encode(request))

        def encode_next(state: RequestState) -> None:
            assert isinstance(pipeline, PackedPipeline)
            piece = plan.encode_pieces[_id_of(state)]
            pipeline.encode_next(state, range(piece.first, piece.end))

        together = self._together(self._ranks_share_encodes)
        self._states |= self._run_each(list(begins.values()), encode, result, together)
        cut = [self._states[i] for i in request_ids if i in plan.encode_pieces and i in self._states]
        self._run_each(cut, encode_next, result, run_alone)

    def _resume(self, plan: StepPlan, result: StepResult) -> None:
        """Move requests that were just encoded to the steps of their checkpoints."""

        def run(state: RequestState) -> None:
            assert isinstance(self.pipeline, PackedPipeline)
            self.pipeline.resume(state, plan.resume[_id_of(state)])

        states = [self._states[i] for i in plan.resume if i in self._states]
        self._run_each(states, run, result, run_alone)

    def _checkpoints(self, plan: StepPlan, result: StepResult) -> Callable[[], None]:
        """Start to copy the states of `plan.checkpoint` to the host; the returned call puts them into `result`.

        All ranks hold the same states, so one of them copies. A request with values that are not finite fails now
        instead of at its end.
        """
        if not plan.checkpoint or self.ranks.mesh.world.rank != 0:
            return lambda: None
        states = [self._states[i] for i in plan.checkpoint if i in self._states and i not in self._skipped]
        ready = [s for s in states if _id_of(s) not in plan.denoise or _id_of(s) in result.advanced]
        pipeline = self.pipeline
        assert isinstance(pipeline, PackedPipeline)
        copied = download_checkpoints({_id_of(state): pipeline.save(state) for state in ready}, self._device)
        requests = {_id_of(state): state.request for state in ready}

        def take() -> None:
            start = time.perf_counter()
            for request_id, checkpoint in copied().items():
                if checkpoint is None:
                    result.errors[request_id] = not_finite_error(requests[request_id], self._info, self._dtype)
                else:
                    result.checkpoints[request_id] = checkpoint
            result.checkpoint_seconds = time.perf_counter() - start

        return take

    @property
    def _ranks_share_encodes(self) -> bool:
        """Whether ranks exchange tensors in an encode."""
        mesh = self.ranks.mesh
        return mesh.tensor.size > 1 or mesh.text_encoder.size > 1

    def _denoise(self, request_ids: Sequence[str], plan: StepPlan, result: StepResult) -> dict[str, Tensor]:
        """Advance each request by one step. Returns the predicted final latents of requests with a preview."""
        states = [self._states[i] for i in request_ids]

        def predict(batch: Sequence[RequestState]) -> list[tuple[Tensor, ...]]:
            groups = [g for s in batch for g in plan.placement.get(_id_of(s), [0] * len(s.sequence_lengths))]
            try:
                return self.pipeline.predict(batch, groups)
            except Exception:  # the step may be tried again: nothing of this try may stay in the caches
                for state in batch:
                    state.discard()
                raise

        branches = self._run_batch(states, predict, result, self._together(self.ranks.size > 1))
        computed = {_id_of(s): s.sequence_lengths[: len(branches.get(_id_of(s), ()))] for s in states}
        result.num_sequences = sum(len(lengths) for lengths in computed.values())
        result.num_tokens = sum(sum(lengths) for lengths in computed.values())
        clean: dict[str, Tensor] = {}

        def finish(state: RequestState) -> None:
            request_id = _id_of(state)
            try:
                predicted = self.pipeline.advance(state, branches[request_id], request_id in plan.preview)
            finally:
                skipped = state.settle()  # also after an error: step caches of all ranks keep and drop alike
            if predicted is not None:
                clean[request_id] = predicted
            if state.num_made != 1:
                result.made[request_id] = state.num_made
            if skipped and self.ranks.mesh.rank_group.rank == 0:
                result.cached[request_id] = skipped / len(branches[request_id])

        advancing = [s for s in states if _id_of(s) in branches]
        result.advanced = list(self._run_each(advancing, finish, result, run_alone))
        return {i: latents for i, latents in clean.items() if i in result.advanced}

    @property
    def _decode_group(self) -> int:
        """Number of the group of ranks, which share each decode, that this rank is in."""
        return self.ranks.mesh.world.rank // self.ranks.mesh.vae.size

    def _decode(
        self,
        latents: Mapping[str, Tensor],
        decode: Callable[[Sequence[DiffusionRequest], Sequence[Tensor]], Sequence[Picture]],
        result: StepResult,
    ) -> dict[str, CheckedPicture]:
        """Decode this rank's part of the pictures: ranks, or groups of ranks that share a decode, take turns.

        latents: by request id; for a preview, a prediction.
        """
        mesh = self.ranks.mesh
        mine = list(latents)[self._decode_group :: mesh.world.size // mesh.vae.size]

        def run(batch: Sequence[DiffusionRequest]) -> Sequence[CheckedPicture | None]:
            pictures = decode(batch, [latents[request.request_id] for request in batch])
            if any(picture.is_blocked for picture in pictures):
                raise ModerationBlockedError("the model's safety checker blocked the picture")
            if not pictures:  # the first rank of the group has them
                return [None] * len(batch)
            self._tiled.note(zip(batch, pictures), result)
            return [self._checked(request, picture) for request, picture in zip(batch, pictures, strict=True)]

        decoded = self._run_batch([self._requests[i] for i in mine], run, result, self.ranks.attempt_decode)
        return {request_id: picture for request_id, picture in decoded.items() if picture is not None}

    def _decode_pieces(self, pieces: Mapping[str, DecodePiece], result: StepResult) -> dict[str, CheckedPicture]:
        """Decode the pieces of videos that belong to this rank's group. A piece that fails cannot be repeated."""
        mine = [self._states[i] for i, piece in pieces.items() if piece.group == self._decode_group]

        def run(state: RequestState) -> CheckedPicture | None:
            assert isinstance(self.pipeline, PackedPipeline)
            piece = pieces[_id_of(state)]
            frames = self.pipeline.decode_next(state, range(piece.first, piece.end))
            if frames is None:
                return None
            self._tiled.note([(state.request, frames)], result)
            return self._checked(state.request, frames)

        decoded = self._run_each(mine, run, result, self.ranks.attempt_decode)
        return {request_id: frames for request_id, frames in decoded.items() if frames is not None}

    def _checked(self, request: DiffusionRequest, picture: Picture) -> CheckedPicture:
        """Add the finite flags. That of the latents describes the request's state, also for a preview."""
        latents = self._states[request.request_id].latents
        return CheckedPicture(request, picture.pixels, torch.stack((is_finite(latents), picture.is_finite)))

    def _download(self, pictures: Mapping[str, CheckedPicture]) -> Callable[[], dict[str, DownloadedPicture]]:
        """Start to copy pictures and flags to the host; the returned call waits for the copies."""
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

    def _run_batch(
        self,
        items: Sequence[Item],
        run: Callable[[Sequence[Item]], Sequence[Output]],
        result: StepResult,
        attempt: Attempt,
    ) -> dict[str, Output]:
        """Outputs of `run` by request id: all items in one call; after an error each alone, so that only one fails."""
        if not items:
            return {}
        if len(items) > 1:
            try:
                outputs = attempt(lambda: run(items))
                return {_id_of(item): output for item, output in zip(items, outputs, strict=True)}
            except RanksLostError:
                raise
            except Exception as error:
                # The cause, whatever it is, is one item or their number: the single runs tell.
                self._release_memory(error)
        return self._run_each(items, lambda item: run([item])[0], result, attempt)

    def _run_each(
        self, items: Sequence[Item], run: Callable[[Item], Output], result: StepResult, attempt: Attempt
    ) -> dict[str, Output]:
        """Outputs of `run` by request id; an item that raises gets an ItemError in `result` instead."""
        outputs = {}
        for item in items:
            try:
                outputs[_id_of(item)] = attempt(partial(run, item))
            except RanksLostError:
                raise
            except PeerFailedError:
                self._end(_id_of(item), attempt)
            except Exception as error:
                # Any error of one request must not reach the other requests.
                result.errors[_id_of(item)] = item_error(error)
                self._end(_id_of(item), attempt)
                self._release_memory(error)
        return outputs

    def _end(self, request_id: str, attempt: Attempt) -> None:
        """End a request that failed in `attempt`. It is dropped when all ranks drop it: now, or when it is released.

        If one rank had more of the step cache's budget left than another, they would drop different tensors of others.
        """
        if self.ranks.size == 1 or attempt == self.ranks.attempt:
            self._failed.append(request_id)
        else:
            self._skipped.add(request_id)

    def _release_memory(self, error: Exception) -> None:
        """Free what can be made again: a lack of memory may be the cause of `error`."""
        if not isinstance(error, InvalidRequestError):
            if self.ranks.size == 1:
                self.pipeline.release_memory()
            else:  # ranks drop captured graphs in the same step; otherwise one rank would capture alone
                self._lacks_memory = True
        self._device.release_memory()

    def _together(self, shared: bool) -> Attempt:
        """Call of work that all ranks share, or that each does alone."""
        return self.ranks.attempt if shared else run_alone


def run_alone(run: Callable[[], Output]) -> Output:
    """Call of work in which ranks exchange nothing."""
    return run()


def _id_of(item: DiffusionRequest | RequestState) -> str:
    return item.request_id if isinstance(item, DiffusionRequest) else item.request.request_id
