"""Which requests advance in the next step of the device. Arithmetic alone: no torch, no clock, no tasks.

A request is a row of items: one text encoding, N denoising steps, one decode. `schedule` fills a plan with
the next item of the first requests in order, up to a budget of tokens; `update` takes what came of it. The
scheduler advances its own view when it schedules, so a second plan can be written before the outcome of the
first is known.

Work is counted in the units of `RequestCost`, and a denoising step adds the units that its fixed overhead
would have bought. An encode or a decode takes as many tokens of the budget as it costs units: a unit is one
token through the linear layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm_omni.diffusion.data import OmniDiffusionConfig, SchedulingPolicy
from vllm_omni.diffusion.placement import Placement, balance
from vllm_omni.diffusion.plan import ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.request import DiffusionRequest, check_number
from vllm_omni.errors import InvalidRequestError, QueueFullError

MAX_PLANS_UNDER_WAY = 2
MAX_DEATHS_OF_A_REQUEST = 3
"""A request that ran, the last time alone, when this many workers died is not run again."""
AGEING = 0.1
"""Units by which a waiting request moves forward for each unit done for others."""
_SMALL_SHARE = 0.25
"""A part of the budget that may join any step; see `Scheduler._may_join`."""
_RATE_MEMORY = 0.95
"""Weight that past steps keep, step by step, in the measured rate."""


class Phase(Enum):
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass(eq=False)
class Entry:
    """A request on its way, as far as plans have taken it (which may be ahead of the device)."""

    request: DiffusionRequest
    number: int
    """Order of arrival."""
    arrival_work: float
    """Units planned for the device when it arrived."""
    step_overhead: float
    """Units that the fixed overhead of a step is worth."""
    first_step_id: int = 0
    """Plan in which this run began: outcomes of older plans speak of an earlier run."""
    previews: set[int] = field(default_factory=set)
    """Steps whose preview is still to be delivered."""
    served: float = 0.0
    """Units planned for it."""
    steps: int = 0
    encoded: bool = False
    decoded: bool = False
    alone: bool = False
    """Shares no step with others: it ran out of memory in company, or may have killed workers."""
    num_deaths: int = 0
    """Workers that died while they ran it."""
    groups: Sequence[int] = ()
    """Of ranks, that computed its guidance branches last."""

    @property
    def phase(self) -> Phase:
        if not self.encoded:
            return Phase.ENCODE
        return Phase.DENOISE if self.steps < self.request.num_inference_steps else Phase.DECODE

    @property
    def remaining(self) -> float:
        """Units still to be planned."""
        cost, steps = self.request.cost, self.request.num_inference_steps - self.steps
        num_decodes = sum(step > self.steps for step in self.previews) + (not self.decoded)
        return (not self.encoded) * cost.encode + steps * (cost.step + self.step_overhead) + num_decodes * cost.decode

    def next_item(self) -> Item:
        cost = self.request.cost
        if self.phase is Phase.ENCODE:
            return Item(self, Phase.ENCODE, cost.encode, cost.encode)
        if self.phase is Phase.DECODE:
            return Item(self, Phase.DECODE, cost.decode, cost.decode)
        preview = self.steps + 1 in self.previews
        extra = cost.decode if preview else 0.0
        return Item(
            self, Phase.DENOISE, cost.tokens_per_step + extra, cost.step + self.step_overhead + extra, preview=preview
        )

    def advance(self, item: Item) -> None:
        self.served += item.work
        if item.phase is Phase.ENCODE:
            self.encoded = True
        elif item.phase is Phase.DENOISE:
            self.steps += 1
        else:
            self.decoded = True

    def rewind(self) -> None:
        """Back to the start; previews that were delivered stay delivered, work that was lost counts as waiting."""
        self.steps, self.served, self.encoded, self.decoded = 0, 0.0, False, False


@dataclass(frozen=True)
class Item:
    """The next piece of work of one request."""

    entry: Entry
    phase: Phase
    tokens: float
    """What it takes of the budget."""
    work: float
    preview: bool = False


Order = tuple[float, ...]


def fair_order(entry: Entry) -> Order:
    """Least remaining work first, with ageing.

    Effective work is `remaining - AGEING * (work done for others since it arrived)`. The device's work since
    then is `done - arrival_work`, of which `served` was its own; `done` is the same for all and drops out.
    A request of R units is overtaken by none that arrives more than R / AGEING units of device work after it.
    """
    return (entry.remaining + AGEING * (entry.arrival_work + entry.served),)


def fcfs_order(entry: Entry) -> Order:
    """First come, first served, but a picture that only needs its decode does not wait for longer ones."""
    return (entry.phase is not Phase.DECODE, entry.number)


_ORDERS: dict[SchedulingPolicy, Callable[[Entry], Order]] = {"fair": fair_order, "fcfs": fcfs_order}


@dataclass(frozen=True)
class _UnderWay:
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
        self._policy_order = _ORDERS[config.scheduling_policy]
        self._step_overhead = ready.step_overhead_seconds / ready.seconds_per_unit
        # Decaying sums; their quotient is the rate. They begin as one full step at the worker's own estimate.
        self._rate_work = float(self._max_batch_tokens)
        self._rate_seconds = self._max_batch_tokens * ready.seconds_per_unit
        self._entries: dict[str, Entry] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._last: tuple[list[tuple[str, Phase, bool]], float] = [], 0.0
        """Of the plan that was done last: its tasks, and the seconds it took."""
        self._release: list[str] = []
        self._planned_work = 0.0
        self._next_number = 0
        self._next_step_id = 0

    # Requests ---------------------------------------------------------------------------------------------

    def check(self, requests: Sequence[DiffusionRequest]) -> None:
        """Whether all of them would be taken now.

        Raises QueueFullError (with `retry_after`) and InvalidRequestError (an id twice, or more at once than
        the queue ever takes).
        """
        self._check_ids(requests)
        self._check_room(requests)

    def add(self, requests: Sequence[DiffusionRequest]) -> None:
        """Take all of them or none. Raises what `check` raises."""
        self.check(requests)
        for request in requests:
            self._entries[request.request_id] = self._new_entry(request)
            self._next_number += 1

    def abort(self, request_ids: Iterable[str]) -> dict[str, bool]:
        """Forget requests; their places are free in the next plan. Those that were known -> whether a worker knows."""
        known = {id: self._entries[id].encoded for id in request_ids if id in self._entries}
        for request_id in known:
            self._end(request_id)
        return known

    def _new_entry(self, request: DiffusionRequest) -> Entry:
        previews = set(request.preview_steps)
        return Entry(request, self._next_number, self._planned_work, self._step_overhead, previews=previews)

    def _check_ids(self, requests: Sequence[DiffusionRequest]) -> None:
        ids = [request.request_id for request in requests]
        if taken := [id for n, id in enumerate(ids) if id in self._entries or id in ids[:n]]:
            raise InvalidRequestError(f"request id {taken[0]!r} is in use", param="request_id")
        check_number(len(ids), self._max_num_queued_reqs)

    def _check_room(self, requests: Sequence[DiffusionRequest]) -> None:
        if not self._entries:
            return  # a request longer than the whole queue may still run when nobody else is there
        surplus = len(self._entries) + len(requests) - self._max_num_queued_reqs
        seconds_over = self.queue_seconds + sum(map(self._total_seconds, requests)) - self._max_queue_seconds
        if surplus <= 0 and seconds_over <= 0:
            return
        in_order = sorted(self._entries.values(), key=self._order)
        work_ahead = self._work_under_way + sum(entry.remaining for entry in in_order[: max(surplus, 0)])
        retry_after = max(seconds_over, work_ahead * self.seconds_per_unit if surplus > 0 else 0.0)
        # No more than the whole queue can drain.
        raise QueueFullError(
            f"the queue is full ({len(self._entries)} requests, {self.queue_seconds:.1f} s of work)",
            retry_after=min(retry_after, self.queue_seconds),
        )

    # Plans ------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when there is nothing to do."""
        assert len(self._under_way) < MAX_PLANS_UNDER_WAY
        items = self._select()
        if not items and not self._release:
            return None
        plan = StepPlan(step_id=self._next_step_id, release=self._release)
        self._next_step_id += 1
        self._release = []
        steps: dict[str, int] = {}
        for item in items:
            self._put(item, plan, steps)
        if self._num_rank_groups > 1:
            plan.placement = self._place([self._entries[id] for id in plan.denoise])
        work = sum(item.work for item in items)
        self._planned_work += work
        self._under_way.append(_UnderWay(plan, items, steps, work))
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
        chosen: list[Item] = []
        num_tokens = 0.0
        for entry in sorted(self._candidates(), key=self._order):
            item = entry.next_item()
            if not chosen or self._may_join(item, chosen[0], num_tokens):
                chosen.append(item)
                num_tokens += item.tokens
            if len(chosen) == self._max_num_seqs or chosen[0].entry.alone:
                break
        return chosen

    def _candidates(self) -> list[Entry]:
        """The requests with work to plan; of those that have not begun none while as many as the model holds have."""
        undone = [entry for entry in self._entries.values() if not entry.decoded]
        begun = [entry for entry in undone if entry.encoded]
        return begun if self._max_running is not None and len(begun) >= self._max_running else undone

    def _may_join(self, item: Item, first: Item, num_tokens: float) -> bool:
        """Whether `item` may share a step of `num_tokens` that `first` leads.

        Denoising steps gain from company, encodes and decodes do not: a step that one of these leads takes
        no other kind, so that its outcome is not held up. And nobody may more than triple the step for those
        ahead, unless it is small: a long request does not ride along with a short one, it waits.

        An encode beside denoising counts as the steps that it leads to: where these would fit, waiting for
        the encode would keep the pack half empty. If it is long it exceeds the budget, and is the last to join.
        """
        if item.entry.alone or (first.phase is not Phase.DENOISE and item.phase is not first.phase):
            return False
        room = self._max_batch_tokens - num_tokens
        joins_later = first.phase is Phase.DENOISE and item.phase is Phase.ENCODE
        tokens = item.entry.request.cost.tokens_per_step if joins_later else item.tokens
        return tokens <= min(room, max(2 * num_tokens, _SMALL_SHARE * self._max_batch_tokens))

    def _put(self, item: Item, plan: StepPlan, steps: dict[str, int]) -> None:
        entry, request_id = item.entry, item.entry.request.request_id
        if item.phase is Phase.ENCODE:
            entry.first_step_id = plan.step_id
            plan.new_requests.append(entry.request)
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
        under_way = self._under_way.popleft()
        assert result.step_id == under_way.plan.step_id
        if under_way.work > 0:
            self._rate_work = _RATE_MEMORY * self._rate_work + under_way.work
            self._rate_seconds = _RATE_MEMORY * self._rate_seconds + seconds
        self._last = under_way.tasks, seconds
        update = Update()
        for item in under_way.items:
            request_id = item.entry.request.request_id
            if self._entries.get(request_id) is not item.entry or item.entry.first_step_id > result.step_id:
                continue  # aborted, failed or started again since
            if error := _error_of(item, result):
                self._fail(item.entry, error, in_company=len(under_way.items) > 1, update=update)
                continue
            if item.phase is Phase.DENOISE:
                update.steps[request_id] = under_way.steps[request_id]
                if item.preview:
                    item.entry.previews.discard(under_way.steps[request_id])
            elif item.phase is Phase.DECODE:
                update.finished.append(request_id)
                self._end(request_id)
        return update

    def _fail(self, entry: Entry, error: ItemError, in_company: bool, update: Update) -> None:
        request_id = entry.request.request_id
        if error.kind == "out_of_memory" and in_company and not entry.alone:
            entry.alone = True
            entry.rewind()
            # Plans already sent count for the old run; the new one begins in a later plan.
            entry.first_step_id = self._next_step_id
            self._release.append(request_id)
            update.replayed.append(request_id)
            return
        update.failed[request_id] = error
        self._end(request_id)

    def reset(self) -> Update:
        """The worker died: everything begins again, from the seeds. Blames no request but a repeated suspect."""
        update = Update()
        suspects = self._under_way[0].items if self._under_way else []
        self._under_way.clear()
        self._release.clear()
        for item in suspects:
            item.entry.num_deaths += 1
            if self._entries.get(item.entry.request.request_id) is not item.entry:
                continue
            if item.entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST:
                message = f"{item.entry.num_deaths} workers died while they ran this request"
                update.failed[item.entry.request.request_id] = ItemError(message, "internal")
                del self._entries[item.entry.request.request_id]
            item.entry.alone = item.entry.alone or item.entry.num_deaths >= MAX_DEATHS_OF_A_REQUEST - 1
        for entry in self._entries.values():
            entry.rewind()
        update.replayed.extend(self._entries)
        return update

    def _end(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        if entry.encoded:
            self._release.append(request_id)

    # Arithmetic -------------------------------------------------------------------------------------------

    def _order(self, entry: Entry) -> Order:
        return (entry.request.priority, *self._policy_order(entry), entry.number)

    def _total_seconds(self, request: DiffusionRequest) -> float:
        return self._new_entry(request).remaining * self.seconds_per_unit

    @property
    def _work_under_way(self) -> float:
        return sum(under_way.work for under_way in self._under_way)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def num_running(self) -> int:
        return sum(entry.encoded for entry in self._entries.values())

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - self.num_running

    @property
    def seconds_per_unit(self) -> float:
        """Measured on the last steps."""
        return self._rate_seconds / self._rate_work

    @property
    def queue_seconds(self) -> float:
        """Time until all work that is here is done."""
        work = self._work_under_way + sum(entry.remaining for entry in self._entries.values())
        return work * self.seconds_per_unit

    @property
    def plan_seconds(self) -> float:
        """Estimated duration of the oldest plan under way: that of the last if its tasks are the same; 0 for none."""
        if not self._under_way:
            return 0.0
        oldest, (last_tasks, last_seconds) = self._under_way[0], self._last
        return last_seconds if oldest.tasks == last_tasks else oldest.work * self.seconds_per_unit

    def eta_seconds(self, requests: Sequence[DiffusionRequest]) -> float:
        """Time until the last of `requests` is done, be they here already or about to be added."""
        theirs = [self._entries.get(request.request_id) or self._new_entry(request) for request in requests]
        if not theirs:
            return 0.0
        last = max(map(self._order, theirs))
        others = [entry for entry in self._entries.values() if entry not in theirs and self._order(entry) < last]
        work = self._work_under_way + sum(entry.remaining for entry in (*theirs, *others))
        return work * self.seconds_per_unit


def _error_of(item: Item, result: StepResult) -> ItemError | None:
    """Why `item` was not done; None when it was."""
    request_id = item.entry.request.request_id
    if error := result.errors.get(request_id):
        return error
    done = {Phase.ENCODE: True, Phase.DENOISE: request_id in result.advanced, Phase.DECODE: request_id in result.images}
    return (
        None
        if done[item.phase]
        else ItemError(f"the worker lost the request before its {item.phase.value}", "internal")
    )
