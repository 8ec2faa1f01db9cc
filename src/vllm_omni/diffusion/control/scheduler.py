"""Which requests advance in the next step of the device. Arithmetic alone: no torch, no clock, no tasks.

A request is a row of items: one text encoding, N denoising steps, one decode. `schedule` fills a plan with
the next item of the first requests in order, up to a budget of tokens; `update` takes what came of it. The
scheduler advances its own view when it schedules, so a second plan can be written before the outcome of the
first is known.

Work is counted in the units of `RequestCost`, and a denoising step adds the units that its fixed overhead
would have bought. An encode or a decode takes as many tokens of the budget as it costs units: a unit is one
token through the linear layers.

No call takes time that grows faster than the logarithm of the number of requests that wait: see `EntryOrder`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from vllm_omni.diffusion.control.admission import check_ids, check_number
from vllm_omni.diffusion.control.queue.entries import ORDERS, Entry, Item, Phase
from vllm_omni.diffusion.control.queue.order import EntryOrder
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.placement import Placement, balance
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.errors import QueueFullError

MAX_PLANS_IN_FLIGHT = 2
MAX_DEATHS_OF_A_REQUEST = 3
"""A request that ran, the last time alone, when this many workers died is not run again."""
_SMALL_SHARE = 0.25
"""A part of the budget that may join any step; see `Scheduler._tokens_left`."""
_RATE_MEMORY = 0.95
"""Weight that past steps keep, step by step, in the measured rate."""


@dataclass(frozen=True)
class _PlanInFlight:
    plan: StepPlan
    items: list[Item]
    steps: dict[str, int]
    """Denoising steps that a request of the plan has made after it."""
    work: float

    @property
    def tasks(self) -> list[tuple[str, Phase, bool]]:
        """What it does for whom; plans of the same tasks take equally long, but for what a step cache skips."""
        return [(item.entry.request.request_id, item.phase, item.preview) for item in self.items]


@dataclass
class Update:
    """What a result means for requests that still run."""

    steps: dict[str, int] = field(default_factory=dict)
    """Denoising steps done by those that made one."""
    finished: list[str] = field(default_factory=list)
    failed: dict[str, ItemError] = field(default_factory=dict)
    replayed: list[str] = field(default_factory=list)
    """Those that start again."""


class Scheduler:
    def __init__(self, config: OmniDiffusionConfig, ready: WorkerReady) -> None:
        self._max_batch_tokens = config.max_batch_tokens or ready.max_batch_tokens
        self._max_num_seqs = min(config.max_num_seqs, ready.max_num_seqs or config.max_num_seqs)
        self._max_running = ready.max_running
        self._num_rank_groups = config.parallel.cfg_parallel_size
        self._max_num_queued_reqs = config.max_num_queued_reqs
        self._max_queue_seconds = config.max_queue_seconds
        self._step_overhead = ready.step_overhead_seconds / ready.seconds_per_unit
        # Decaying sums; their quotient is the rate. They begin as one full step at the worker's own estimate.
        self._rate_work = float(self._max_batch_tokens)
        self._rate_seconds = self._max_batch_tokens * ready.seconds_per_unit
        self._entries: dict[str, Entry] = {}
        self._begun: dict[str, Entry] = {}
        """Requests whose encode was planned, by id."""
        self._order = EntryOrder(ORDERS[config.scheduling_policy])
        """Requests that still have steps to plan."""
        self._in_flight: deque[_PlanInFlight] = deque()
        self._last: tuple[list[tuple[str, Phase, bool]], float] = [], 0.0
        """Tasks of the plan that was done last, and the seconds that it took."""
        self._release: list[str] = []
        self._planned_work = 0.0
        self._next_number = 0
        self._next_step_id = 0

    # Requests ---------------------------------------------------------------------------------------------

    def check(self, requests: Sequence[ScheduledRequest]) -> None:
        """Whether all of them would be taken now.

        Raises QueueFullError (with `retry_after`) and InvalidRequestError (an id twice, or more at once than
        the queue ever takes).
        """
        self._check_ids(requests)
        self._check_room(requests)

    def add(self, requests: Sequence[ScheduledRequest]) -> None:
        """Take all of them or none. Raises what `check` raises."""
        self.check(requests)
        for request in requests:
            entry = self._entries[request.request_id] = self._new_entry(request)
            self._next_number += 1
            self._order.add(entry)

    def abort(self, request_ids: Iterable[str]) -> dict[str, bool]:
        """Forget requests; their places are free in the next plan. Those that were known -> whether a worker knows."""
        known = {id: self._entries[id].encoded for id in request_ids if id in self._entries}
        for request_id in known:
            self._end(request_id)
        return known

    def _new_entry(self, request: ScheduledRequest) -> Entry:
        previews = set(request.preview_steps)
        return Entry(request, self._next_number, self._planned_work, self._step_overhead, previews=previews)

    def _check_ids(self, requests: Sequence[ScheduledRequest]) -> None:
        ids = [request.request_id for request in requests]
        check_ids(ids, self._entries.__contains__)
        check_number(len(ids), self._max_num_queued_reqs)

    def _check_room(self, requests: Sequence[ScheduledRequest]) -> None:
        if not self._entries:
            return  # a request longer than the whole queue may still run when nobody else is there
        surplus = len(self._entries) + len(requests) - self._max_num_queued_reqs
        seconds_over = self.queue_seconds + sum(map(self._total_seconds, requests)) - self._max_queue_seconds
        if surplus <= 0 and seconds_over <= 0:
            return
        # Requests whose last step is planned leave the queue first.
        num_ending = len(self._entries) - len(self._order)
        first = islice(self._order, max(surplus - num_ending, 0))
        work_ahead = self._work_in_flight + sum(entry.remaining for entry in first)
        retry_after = max(seconds_over, work_ahead * self.seconds_per_unit if surplus > 0 else 0.0)
        # No more than the whole queue can drain.
        raise QueueFullError(
            f"the queue is full ({len(self._entries)} requests, {self.queue_seconds:.1f} s of work)",
            retry_after=min(retry_after, self.queue_seconds),
        )

    # Plans ------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when there is nothing to do."""
        assert len(self._in_flight) < MAX_PLANS_IN_FLIGHT
        items = self._select()
        if not items and not self._release:
            return None
        plan = StepPlan(step_id=self._next_step_id, release=self._release)
        self._next_step_id += 1
        self._release = []
        steps: dict[str, int] = {}
        for item in items:
            self._order.remove(item.entry)
            self._add_to_plan(item, plan, steps)
        self._order.set_active(item.entry for item in items)
        if self._num_rank_groups > 1:
            plan.placement = self._place([self._entries[id] for id in plan.denoise])
        work = sum(item.work for item in items)
        self._planned_work += work
        self._in_flight.append(_PlanInFlight(plan, items, steps, work))
        return plan

    def _place(self, entries: Sequence[Entry]) -> Placement:
        tokens = {entry.request.request_id: entry.request.cost.branch_tokens for entry in entries}
        last = {entry.request.request_id: entry.groups for entry in entries if entry.groups}
        placement = balance(tokens, self._num_rank_groups, last)
        for entry in entries:
            entry.groups = placement[entry.request.request_id]
        return placement

    def _select(self) -> list[Item]:
        """The next items of the first requests in order: the first one always, others as far as they fit."""
        is_full = self._max_running is not None and self._order.num_begun >= self._max_running
        candidates = self._order.candidates(begun_only=is_full)
        chosen: list[Item] = []
        num_tokens, lead, limit = 0.0, Phase.ENCODE, math.inf
        while len(chosen) < self._max_num_seqs and (entry := candidates.next(lead, limit)):
            chosen.append(entry.next_item())
            num_tokens += chosen[-1].tokens
            lead, limit = chosen[0].phase, self._tokens_left(num_tokens)
            if entry.runs_alone:
                break
        return chosen

    def _tokens_left(self, num_tokens: float) -> float:
        """Most tokens that may join a step of `num_tokens`.

        Nobody may more than triple the step for those ahead, unless it is small: a long request does not ride along
        with a short one, it waits.
        """
        return min(
            self._max_batch_tokens - num_tokens,
            max(2 * num_tokens, _SMALL_SHARE * self._max_batch_tokens),
        )

    def _add_to_plan(self, item: Item, plan: StepPlan, steps: dict[str, int]) -> None:
        entry, request_id = item.entry, item.entry.request.request_id
        if item.phase is Phase.ENCODE:
            entry.first_step_id = plan.step_id
            self._begun[request_id] = entry
            plan.new_requests.append(entry.request.request)
            plan.encode.append(request_id)
        elif item.phase is Phase.DENOISE:
            plan.denoise.append(request_id)
            steps[request_id] = entry.steps + 1
            if item.preview:
                plan.preview.append(request_id)
        else:
            plan.decode.append(request_id)
        entry.advance(item)

    # Results ----------------------------------------------------------------------------------------------

    def update(self, result: StepResult, seconds: float) -> Update:
        """Apply the outcome of the oldest plan under way, which took the device `seconds`."""
        in_flight = self._in_flight.popleft()
        assert result.step_id == in_flight.plan.step_id
        if in_flight.work > 0:
            self._rate_work = _RATE_MEMORY * self._rate_work + in_flight.work
            self._rate_seconds = _RATE_MEMORY * self._rate_seconds + seconds
        self._last = in_flight.tasks, seconds
        update = Update()
        for item in in_flight.items:
            request_id = item.entry.request.request_id
            if self._entries.get(request_id) is not item.entry or item.entry.first_step_id > result.step_id:
                continue  # aborted, failed or started again since
            if error := _error_of(item, result):
                self._fail(item.entry, error, in_company=len(in_flight.items) > 1, update=update)
                continue
            if item.phase is Phase.DENOISE:
                update.steps[request_id] = in_flight.steps[request_id]
                if item.preview:
                    item.entry.previews.discard(in_flight.steps[request_id])
            elif item.phase is Phase.DECODE:
                update.finished.append(request_id)
                self._end(request_id)
        return update

    def _fail(self, entry: Entry, error: ItemError, in_company: bool, update: Update) -> None:
        request_id = entry.request.request_id
        if error.kind == "out_of_memory" and in_company and not entry.runs_alone:
            self._order.remove(entry)
            entry.runs_alone = True
            self._begin_again(entry)
            # Plans already sent count for the old run; the new one begins in a later plan.
            entry.first_step_id = self._next_step_id
            self._release.append(request_id)
            update.replayed.append(request_id)
            return
        update.failed[request_id] = error
        self._end(request_id)

    def reset(self) -> Update:
        """The worker died: what had begun begins again, from the seeds. Blames no request but a repeated suspect."""
        update = Update()
        suspects = [item.entry for item in self._in_flight[0].items] if self._in_flight else []
        self._in_flight.clear()
        for entry in suspects:
            request_id = entry.request.request_id
            entry.num_deaths += 1
            entry.runs_alone = entry.runs_alone or entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST - 1
            if self._entries.get(request_id) is entry and entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST:
                message = f"{entry.num_deaths} workers died while they ran this request"
                update.failed[request_id] = ItemError(message, "internal")
                self._end(request_id)
        for entry in list(self._begun.values()):
            self._order.remove(entry)
            self._begin_again(entry)
            update.replayed.append(entry.request.request_id)
        self._release.clear()
        return update

    def _end(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        self._order.remove(entry)
        if self._begun.pop(request_id, None):
            self._release.append(request_id)

    def _begin_again(self, entry: Entry) -> None:
        """`entry` is not in the order."""
        del self._begun[entry.request.request_id]
        entry.rewind()
        self._order.add(entry)

    # Arithmetic -------------------------------------------------------------------------------------------

    def _total_seconds(self, request: ScheduledRequest) -> float:
        return self._new_entry(request).remaining * self.seconds_per_unit

    @property
    def _work_in_flight(self) -> float:
        return sum(in_flight.work for in_flight in self._in_flight)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        return self._order.num_waiting

    @property
    def seconds_per_unit(self) -> float:
        """Measured on the last steps."""
        return self._rate_seconds / self._rate_work

    @property
    def queue_seconds(self) -> float:
        """Time until all work that is here is done."""
        return (self._work_in_flight + self._order.work) * self.seconds_per_unit

    @property
    def plan_seconds(self) -> float:
        """Estimated duration of the oldest plan under way: that of the last if its tasks are the same; 0 for none."""
        if not self._in_flight:
            return 0.0
        oldest, (last_tasks, last_seconds) = self._in_flight[0], self._last
        return last_seconds if oldest.tasks == last_tasks else oldest.work * self.seconds_per_unit

    def eta_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Time until the last of `requests` is done, be they here already or about to be added."""
        if not requests:
            return 0.0
        new = [self._new_entry(request) for request in requests if request.request_id not in self._entries]
        here = [self._entries[request.request_id] for request in requests if request.request_id in self._entries]
        work = self._work_in_flight + self._order.work_up_to(max(map(self._order.key, (*here, *new))))
        return (work + sum(entry.remaining for entry in new)) * self.seconds_per_unit


def _error_of(item: Item, result: StepResult) -> ItemError | None:
    """Why `item` was not done; None when it was."""
    request_id = item.entry.request.request_id
    if error := result.errors.get(request_id):
        return error
    done = {Phase.ENCODE: True, Phase.DENOISE: request_id in result.advanced, Phase.DECODE: request_id in result.images}
    return (
        None
        if done[item.phase]
        else ItemError(f"the worker lost the request before its {item.phase.name.lower()}", "internal")
    )
