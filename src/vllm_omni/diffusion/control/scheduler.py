"""Scheduler: choose the requests that advance in the next step. Plain Python, no clock, no tasks.

A request is a sequence of items: one encode, N denoising steps, one decode. The decode of a video, and the encode of a
conditioning video, are cut into items of a few latent frames, so that other requests run between them. `schedule` fills
a plan with the next items of the first requests in order, up to a budget of tokens. `update` applies the result.
Entries advance when they are planned, so a second plan can be made before the result of the first is known.

A request may be checkpointed after a denoising step, or on demand by a plan that does not advance it. After a worker's
death it begins again from its newest checkpoint.

Work is counted in units of `RequestCost`. A denoising step also counts the units that the fixed overhead of a step is
worth. An encode or a decode takes as many tokens of the budget as it costs units, because a unit is the work of one
token in the linear layers.

The time of every call grows at most with the logarithm of the number of waiting requests: see `EntryOrder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from vllm_omni.diffusion.control.admission import check_ids, check_number
from vllm_omni.diffusion.control.decode_groups import frames_of_piece
from vllm_omni.diffusion.control.plans_in_flight import MAX_PLANS_IN_FLIGHT, PlanInFlight, PlansInFlight
from vllm_omni.diffusion.control.queue.entries import ORDERS, Entry, Item, Phase
from vllm_omni.diffusion.control.queue.order import EntryOrder
from vllm_omni.diffusion.control.request_errors import request_error
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.selection import Selection
from vllm_omni.diffusion.control.updates import Update, error_of
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterRead
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.placement import Placement, balance
from vllm_omni.diffusion.messages.plan import DecodePiece, EncodePiece, ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.errors import QueueFullError

MAX_DEATHS_OF_A_REQUEST = 3
"""A request fails when so many workers died while they ran it; the last time it ran alone."""


class Scheduler:
    """Owns all requests that have not ended. `add`, then `schedule` and `update` in turn."""

    def __init__(self, config: OmniDiffusionConfig, ready: WorkerReady) -> None:
        self._num_rank_groups = config.parallel.cfg_parallel_size
        self._decode_rate = ready.seconds_per_unit
        """Seconds of one unit of a decode: measured at the start, with the number of units."""
        self._max_num_queued_reqs = config.max_num_queued_reqs
        self._max_queue_seconds = config.max_queue_seconds
        self._step_overhead = max(ready.step_overhead_seconds, ready.copy_seconds) / ready.seconds_per_unit
        self._entries: dict[str, Entry] = {}
        self._begun: dict[str, Entry] = {}
        """Requests whose first item was planned, by id."""
        self._order = EntryOrder(ORDERS[config.scheduling_policy])
        """Requests that still have items to plan."""
        self._asked: dict[str, Entry] = {}
        """Requests whose checkpoint was asked for and is in no plan yet."""
        self._release: list[str] = []
        """Ended requests that the next plan tells the workers to drop."""
        self.adapters = ResidentAdapters(config, ready.adapter_bytes, ready.loads_adapters_in_steps)
        self._awaiting: dict[str, Entry] = {}
        """Requests outside the order, with nothing to plan until their adapters are read."""
        self._encodes_early = not ready.loads_adapters_in_steps
        self._selection = Selection(config, ready, self._order, self._begun, self._asked, self.adapters)
        self._turns, self._decode_groups = self._selection.turns, self._selection.decode_groups
        # The rate begins as one full step at the worker's own estimate.
        max_batch_tokens = self._selection.max_batch_tokens
        self._in_flight = PlansInFlight(max_batch_tokens, max_batch_tokens * ready.seconds_per_unit)
        self._planned_work = 0.0
        self._next_number = 0
        self._next_step_id = 0

    # Requests ---------------------------------------------------------------------------------------------

    def check(self, requests: Sequence[ScheduledRequest]) -> None:
        """Raise what `add` would raise, and add nothing.

        Raises QueueFullError (with `retry_after`) and InvalidRequestError (an id twice, more requests than the queue
        ever holds, or an adapter under which too many workers died).
        """
        check_ids([request.request_id for request in requests], self._entries.__contains__)
        check_number(len(requests), self._max_num_queued_reqs)
        for loras in (request.request.loras for request in requests):
            if error := self.adapters.refusal(lora.key for lora in loras):
                raise request_error(error, loras)
        self._check_room(requests)

    def add(self, requests: Sequence[ScheduledRequest]) -> None:
        """Add all requests or none. Raises what `check` raises."""
        self.check(requests)
        for request in requests:
            entry = self._entries[request.request_id] = self._new_entry(request)
            self._next_number += 1
            if loras := request.request.loras:
                keys = [lora.key for lora in loras]
                self.adapters.hold(request.request_id, keys, self._note_ready, request.priority)
            self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        """Add an entry to the order, or to those that wait for adapters when it has nothing else to do."""
        can_begin = self.adapters.is_ready(entry.request.request_id)
        if entry.begun or can_begin or (self._encodes_early and not entry.encoded_early):
            self._order.add(entry)
        else:
            self._awaiting[entry.request.request_id] = entry

    def _note_ready(self, request_id: str) -> None:
        if entry := self._awaiting.pop(request_id, None):
            self._order.add(entry)

    def note_adapter(self, read: AdapterRead, in_step: bool = False) -> dict[str, ItemError]:
        """Take the result of reading an adapter, and end the requests that fail by it: see `note_read`.

        The ids may be of other holders than requests.
        """
        failed = self.adapters.note_read(read, in_step)
        for request_id in failed:
            if request_id in self._entries:
                self._end(request_id)
        return failed

    def abort(self, request_ids: Iterable[str]) -> dict[str, bool]:
        """Forget requests, so that others take their places in the next plan. Unknown ids are ignored.

        Returns known ids -> whether the request was sent to a worker.
        """
        known = {id: id in self._begun for id in request_ids if id in self._entries}
        for request_id in known:
            self._end(request_id)
        return known

    def request_checkpoint(self, request_id: str) -> bool:
        """Let the next plan take the checkpoint of a request, which that plan does not advance.

        Returns whether a plan will. False: `newest_checkpoint` is as new as any, because the request has made no step
        since, or its model gives no checkpoints.
        """
        entry = self._entries[request_id]
        if not entry.has_made_steps or not entry.request.is_resumable:
            return False
        self._asked[request_id] = entry
        entry.awaits_checkpoint = True
        return True

    def newest_checkpoint(self, request_id: str) -> Checkpoint | None:
        """Checkpoint from which the request would begin again; None: from its first step."""
        return self._entries[request_id].checkpoint

    def _new_entry(self, request: ScheduledRequest) -> Entry:
        return Entry(
            request,
            self._next_number,
            self._planned_work,
            self._step_overhead,
            previews=set(request.preview_steps),
            checkpoint=request.resume,
            frames_per_piece=frames_of_piece(request.frame_cost * self._decode_rate),
        )

    def _check_room(self, requests: Sequence[ScheduledRequest]) -> None:
        if not self._entries:
            return  # an empty server accepts a request that takes longer than `max_queue_seconds`
        surplus = len(self._entries) + len(requests) - self._max_num_queued_reqs
        seconds_over = self.queue_seconds + self.work_seconds(requests) - self._max_queue_seconds
        if surplus <= 0 and seconds_over <= 0:
            return
        # Requests whose last item is planned leave the queue first.
        num_ending = len(self._entries) - len(self._order) - len(self._awaiting)
        first = islice(self._order, max(surplus - num_ending, 0))
        work_ahead = self._in_flight.work + sum(entry.remaining for entry in first)
        retry_after = max(seconds_over, work_ahead * self.seconds_per_unit if surplus > 0 else 0.0)
        raise QueueFullError(
            f"the queue is full ({len(self._entries)} requests, {self.queue_seconds:.1f} s of work)",
            retry_after=min(retry_after, self.queue_seconds),  # then the queue is empty
        )

    # Plans ------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Make the next plan; None when there is nothing to do."""
        assert len(self._in_flight) < MAX_PLANS_IN_FLIGHT
        items = self._selection.choose(self.seconds_per_unit)
        if not (items or self._release or self._asked or self.adapters.has_work):
            return None
        loads = self.adapters.take_loads()
        plan = StepPlan(
            step_id=self._next_step_id,
            release=self._release,
            drop_adapters=self.adapters.take_drops(),
            load_adapters=loads,
            checkpoint=list(self._asked),
        )
        self._next_step_id += 1
        self._release = []
        self._asked.clear()
        work = sum(item.work for item in items)
        work += self._turns.note(items) / self.seconds_per_unit
        steps: dict[str, int] = {}
        for item in items:
            self._order.remove(item.entry)
            self._add_to_plan(item, plan, steps, work * self.seconds_per_unit)
        self._order.set_active(item.entry for item in items if not item.is_early)
        for item in items:
            if item.is_early:
                self._enqueue(item.entry)
        if self._num_rank_groups > 1:
            plan.placement = self._placement([self._entries[id] for id in plan.denoise])
        self._planned_work += work
        checkpoints = [self._entries[id] for id in plan.checkpoint]
        self._in_flight.append(PlanInFlight(plan, items, steps, work, len(self._begun), checkpoints))
        return plan

    def _placement(self, entries: Sequence[Entry]) -> Placement:
        tokens = {entry.request.request_id: entry.request.cost.branch_tokens for entry in entries}
        last = {entry.request.request_id: entry.groups for entry in entries if entry.groups}
        placement = balance(tokens, self._num_rank_groups, last)
        for entry in entries:
            entry.groups = placement[entry.request.request_id]
        return placement

    def _add_to_plan(self, item: Item, plan: StepPlan, steps: dict[str, int], seconds: float) -> None:
        """Add the item to a plan of about `seconds`. steps: see `PlanInFlight`."""
        entry, request_id = item.entry, item.entry.request.request_id
        if item.is_early:
            plan.encode_early.append(entry.request.request)
        elif item.phase is Phase.ENCODE:
            if not entry.begun:
                entry.first_step_id = plan.step_id
                self._begun[request_id] = entry
                plan.new_requests.append(entry.request.request)
                if entry.checkpoint is not None:
                    plan.resume[request_id] = entry.checkpoint
            plan.encode.append(request_id)
            if item.is_encode_piece:
                plan.encode_pieces[request_id] = EncodePiece(item.frames.start, item.frames.stop)
        elif item.phase is Phase.DENOISE:
            plan.denoise.append(request_id)
            steps[request_id] = entry.steps + 1
            if item.preview:
                plan.preview.append(request_id)
        else:
            plan.decode.append(request_id)
            if item.is_decode_piece:
                group = self._decode_groups.group_of(request_id)
                plan.pieces[request_id] = DecodePiece(item.frames.start, item.frames.stop, group)
        entry.advance(item)
        if item.phase is Phase.DENOISE and entry.plan_checkpoint(seconds, self.seconds_per_unit):
            plan.checkpoint.append(request_id)

    # Results ----------------------------------------------------------------------------------------------

    def update(self, result: StepResult, seconds: float) -> Update:
        """Apply the result of the oldest plan in flight, which took `seconds`."""
        finished = self._in_flight.finish_oldest(result, seconds)
        update = Update()
        for item in finished.items:
            entry, request_id = item.entry, item.entry.request.request_id
            if item.is_early or not self._is_current(entry, result.step_id):
                continue
            if error := error_of(item, result):
                self._fail(entry, error, finished.num_begun > 1, update)
                continue
            if item.phase is Phase.DENOISE:
                update.steps[request_id] = finished.steps[request_id]
                if item.preview:
                    entry.previews.discard(finished.steps[request_id])
            elif item.is_encode_piece:
                update.encoded[request_id] = item.frames.stop / entry.request.num_encoded_frames
            elif item.is_decode_piece:
                update.frames.append(request_id)
            if item.is_last:
                update.finished.append(request_id)
                self._end(request_id)
        for entry in finished.checkpoints:
            if self._is_current(entry, result.step_id):
                self._take_checkpoint(entry, result, finished.num_begun > 1, update)
        if any(error.kind == "out_of_memory" for error in result.errors.values()):
            self.adapters.drop_idle()
        return update

    def _is_current(self, entry: Entry, step_id: int) -> bool:
        """Whether this step belongs to the entry's present run: it was not aborted, failed or started again since."""
        return self._entries.get(entry.request.request_id) is entry and entry.first_step_id <= step_id

    def _take_checkpoint(self, entry: Entry, result: StepResult, in_company: bool, update: Update) -> None:
        request_id = entry.request.request_id
        if error := result.errors.get(request_id):
            self._fail(entry, error, in_company, update)
            return
        entry.checkpoint = result.checkpoints.get(request_id, entry.checkpoint)
        if request_id in result.checkpoints or entry.awaits_checkpoint:
            update.checkpoints[request_id] = entry.checkpoint
        if request_id not in self._asked:
            entry.awaits_checkpoint = False

    def _fail(self, entry: Entry, error: ItemError, in_company: bool, update: Update) -> None:
        """End a request, or run it again alone when it ran out of memory beside others.

        in_company: whether other requests were under way, in the same plan or not; each holds memory until it ends.
        """
        request_id = entry.request.request_id
        if error.kind == "out_of_memory" and in_company and not entry.runs_alone:
            self._order.remove(entry)
            entry.runs_alone = True
            self._begin_again(entry, update)
            # Plans that were sent belong to the old run; the new run begins in a later plan.
            entry.first_step_id = self._next_step_id
            self._release.append(request_id)
            return
        update.failed[request_id] = error
        self._end(request_id)

    def reset(self, has_died: bool = True) -> Update:
        """Restart all requests that have begun, from their newest checkpoints: the workers hold nothing any more.

        has_died: whether a worker's death is the reason; otherwise no plan is in flight, and nothing is suspected.
        Requests of the oldest plan are suspects; one fails when `MAX_DEATHS_OF_A_REQUEST` workers died under it. So are
        adapters that were being read: see `ResidentAdapters.reset`, whose holders may be others than requests.
        """
        update = Update()
        for entry in self._in_flight.clear():
            request_id = entry.request.request_id
            entry.num_deaths += 1
            entry.runs_alone = entry.runs_alone or entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST - 1
            if self._entries.get(request_id) is entry and entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST:
                message = f"{entry.num_deaths} workers died while they ran this request"
                update.failed[request_id] = ItemError(message, "internal")
                self._end(request_id)
        for holder, error in self.adapters.reset(has_died).items():
            update.failed[holder] = error
            if holder in self._entries:
                self._end(holder)
        for entry in list(self._begun.values()):
            self._order.remove(entry)
            self._begin_again(entry, update)
        for entry in [its for its in self._entries.values() if its.request.request.loras]:
            if self._awaiting.pop(entry.request.request_id, None) is None:
                self._order.remove(entry)
            entry.encoded_early = False  # early encodes are lost, too
            self._enqueue(entry)
        self._release.clear()
        return update

    def _end(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        if self._awaiting.pop(request_id, None) is None:
            self._order.remove(entry)
        self.adapters.release(request_id)
        self._asked.pop(request_id, None)
        self._decode_groups.release(request_id)
        if self._begun.pop(request_id, None):
            self._release.append(request_id)

    def _begin_again(self, entry: Entry, update: Update) -> None:
        """Rewind an entry that was removed from the order, and add it again."""
        request_id = entry.request.request_id
        del self._begun[request_id]
        self._decode_groups.release(request_id)
        self._asked.pop(request_id, None)
        if entry.awaits_checkpoint:
            update.checkpoints[request_id] = entry.checkpoint
            entry.awaits_checkpoint = False
        entry.rewind()
        self.adapters.free_slots(request_id)
        self._enqueue(entry)
        update.replayed.append(request_id)

    # Numbers ----------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Plans in flight."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return self._order.num_waiting + len(self._awaiting)

    @property
    def seconds_per_unit(self) -> float:
        """Seconds that a unit of work takes, measured over the last steps."""
        return self._in_flight.seconds_per_unit

    @property
    def queue_seconds(self) -> float:
        """Estimated time until all requests are done."""
        awaiting = sum(entry.remaining for entry in self._awaiting.values())
        num_waiting, num_awaiting = self.num_waiting, len(self._awaiting)
        turns = self._turn_seconds(num_waiting, len(self._order) + num_awaiting)
        return (self._in_flight.work + self._order.work + awaiting) * self.seconds_per_unit + turns

    def _turn_seconds(self, num_encodes: int, num_decodes: int) -> float:
        """Estimated seconds of copies of components for so many encodes and decodes."""
        return self._turns.seconds(num_encodes, num_decodes, self._selection.max_num_seqs)

    @property
    def plan_seconds(self) -> float:
        """Estimated duration of the oldest plan in flight; 0 without one."""
        return self._in_flight.oldest_seconds

    def work_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time that `requests` take from start to end when nothing else runs."""
        work = sum(self._new_entry(request).remaining for request in requests)
        return work * self.seconds_per_unit + self._turn_seconds(len(requests), len(requests))

    def eta_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time until the last of `requests` is done. They may be in the queue or about to be added."""
        if not requests:
            return 0.0
        here = [self._entries[request.request_id] for request in requests if request.request_id in self._entries]
        outside = [self._new_entry(request) for request in requests if request.request_id not in self._entries]
        outside += [entry for entry in here if entry.request.request_id in self._awaiting]
        work = self._in_flight.work + self._order.work_up_to(max(map(self._order.key, (*here, *outside))))
        turns = self._turn_seconds(sum(not entry.begun for entry in (*here, *outside)), len(requests))
        return (work + sum(entry.remaining for entry in outside)) * self.seconds_per_unit + turns
