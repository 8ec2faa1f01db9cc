"""Adapters on a fake worker: places, slots, reads that take time, loads and unloads, deaths of workers, replicas."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner, make_config, make_ready, make_scheduled
from tests.diffusion.control.engines import failures, now_request, read_until_done, running_engine, until
from tests.diffusion.control.test_replicas import engines_of, running
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.item_error import ItemError
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import ConfigError, InvalidRequestError, UnavailableError

LIMITS: dict[str, Any] = {"max_loras": 2, "max_cpu_loras": 3}
BAD = ItemError("the file is no adapter", "invalid", param="lora_request")


def key(name: str) -> AdapterKey:
    return AdapterKey(f"/{name}.safetensors")


def loras(names: str) -> tuple[LoRA, ...]:
    """Adapters with these letters as names."""
    return tuple(LoRA(name, key(name).file, 1.0) for name in names)


class SlowReads(FakeRunner):
    """Worker that reads an adapter when `finish` says so."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(make_config(**settings))
        self.reading: dict[AdapterKey, Callable[[AdapterRead], object]] = {}

    def read_adapter(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        assert key not in self.reading
        self.reading[key] = report

    def finish(self, name: str, error: ItemError | None = None) -> None:
        report = self.reading.pop(key(name))
        if error is None:
            super().read_adapter(key(name), report)
        else:
            report(AdapterRead(key(name), error=error))


def slow(**settings: Any) -> FakeExecutor:
    return FakeExecutor(lambda: SlowReads(**settings))


def resident(engine: DiffusionEngine) -> ResidentAdapters:
    (adapters,) = engine.resident_adapters
    return adapters


def request(request_id: str, names: str = "", steps: int = 3) -> ScheduledRequest:
    return now_request(request_id, 64, steps, loras=loras(names))


def drawn(executor: FakeExecutor) -> list[str]:
    """Requests that have begun, in order."""
    return [request_id for plan in executor.runner.plans for request_id in plan.encode]


async def test_steps_go_on_while_a_file_is_read_and_its_request_is_encoded_meanwhile() -> None:
    executor = slow()
    async with running_engine(executor) as engine:
        waits = engine.add([request("adapted", "a")])
        await until(lambda: bool(executor.runner.reading))  # type: ignore[attr-defined]
        await read_until_done(engine.add([request("plain", steps=20)]))
        await until(lambda: any(plan.encode_early for plan in executor.runner.plans))
        assert drawn(executor) == ["plain"]
        assert (engine.status().num_waiting, engine.status().num_running) == (1, 0)
        assert engine.status().queue_seconds > 0
        assert engine.eta_seconds([request("adapted", "a")]) > 0
        executor.runner.finish("a")  # type: ignore[attr-defined]
        assert not failures(await read_until_done(waits))
        early = [each.request_id for plan in executor.runner.plans for each in plan.encode_early]
        assert (early, drawn(executor)) == (["adapted"], ["plain", "adapted"])
        assert (resident(engine).num_loads, resident(engine).load_seconds) == (1, 0.25)


async def test_a_file_that_no_rank_takes_ends_the_requests_that_name_it() -> None:
    executor = slow()
    async with running_engine(executor) as engine:
        events = engine.add([request("bad", "ab"), request("good", "a"), request("worse", "b")])
        await until(lambda: len(executor.runner.reading) == 2)  # type: ignore[attr-defined]
        executor.runner.finish("b", BAD)  # type: ignore[attr-defined]
        executor.runner.finish("a")  # type: ignore[attr-defined]
        ended = failures(await read_until_done(events, 3))
        assert ended == {"bad": InvalidRequestError, "worse": InvalidRequestError}
        assert [resident(engine).state(key(name)) for name in "ab"] == ["device", "disk"]
        assert resident(engine).num_held == 0
        again = engine.add([request("again", "b")])
        await until(lambda: bool(executor.runner.reading))  # type: ignore[attr-defined]
        executor.runner.finish("b")  # type: ignore[attr-defined]
        assert not failures(await read_until_done(again))


async def test_a_request_waits_for_a_slot_and_no_other_overtakes_it_with_adapters() -> None:
    executor = FakeExecutor(lambda: FakeRunner(make_config(**LIMITS)))
    async with running_engine(executor, **LIMITS, scheduling_policy="fcfs") as engine:
        compositions = (("1", "ab"), ("2", "c"), ("3", "a"), ("4", ""))
        events = engine.add([request(name, names, 6) for name, names in compositions])
        assert not failures(await read_until_done(events, 4))
        assert drawn(executor) == ["4", "1", "2", "3"]
        assert resident(engine).num_on_device == 2
        assert resident(engine).num_held == 0


async def test_a_load_is_kept_and_one_that_fails_changes_nothing() -> None:
    executor = slow()
    async with running_engine(executor) as engine:
        loads = [asyncio.create_task(engine.load_adapter(key(name))) for name in "abcdefg"]
        await until(lambda: len(executor.runner.reading) == 4)  # type: ignore[attr-defined]
        for name in "abcdefg":
            await until(lambda name=name: key(name) in executor.runner.reading)  # type: ignore[attr-defined, misc]
            executor.runner.finish(name, BAD if name == "b" else None)  # type: ignore[attr-defined]
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(InvalidRequestError) == 1
        assert isinstance(outcomes[1], InvalidRequestError)
        assert [resident(engine).state(key(name)) for name in "abc"] == ["host", "disk", "host"]
        cancelled = asyncio.create_task(engine.load_adapter(key("x")))
        await until(lambda: bool(executor.runner.reading))  # type: ignore[attr-defined]
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert resident(engine).num_held == 0
        waits = asyncio.create_task(engine.load_adapter(key("y")))
        await until(lambda: len(executor.runner.reading) == 2)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError):
        await waits


async def test_workers_that_die_while_they_read_are_asked_again() -> None:
    executor = slow()
    async with running_engine(executor) as engine:
        events = engine.add([request("1", "a"), request("2", "b")])
        load = asyncio.create_task(engine.load_adapter(key("c")))
        await until(lambda: len(executor.runner.reading) == 3)  # type: ignore[attr-defined]
        executor.runner.finish("b")  # type: ignore[attr-defined]
        await until(lambda: resident(engine).state(key("b")) == "device")
        executor.die()
        await until(lambda: executor.num_starts == 2)
        while not load.done():  # those that were being read are read one after another
            await until(lambda: load.done() or executor.runner.reading)  # type: ignore[attr-defined]
            for name in "abc":
                if key(name) in executor.runner.reading:  # type: ignore[attr-defined]
                    executor.runner.finish(name)  # type: ignore[attr-defined]
        await load
        assert not failures(await read_until_done(events, 2))
        assert resident(engine).num_held == 0


@pytest.mark.parametrize("loads_in_steps", [False, True])
async def test_a_file_that_kills_workers_is_refused_and_others_go_on(loads_in_steps: bool) -> None:
    """A file that kills workers as they read it, or as a whole pipeline loads it into its model."""

    class Kills(FakeRunner):
        def read_adapter(
            self, read: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
        ) -> None:
            if read == key("z") and not loads_in_steps:
                executor.die()
            else:
                super().read_adapter(read, report)

        def execute(self, plan: StepPlan) -> StepResult:
            if key("z") in plan.load_adapters:
                executor.die()
            return super().execute(plan)

    executor = FakeExecutor(lambda: Kills(ready=make_ready(loads_adapters_in_steps=loads_in_steps)))
    async with running_engine(executor) as engine:
        events = engine.add([request("plain", steps=40), request("bad", "bz"), request("good", "a")])
        (loaded,) = await asyncio.gather(engine.load_adapter(key("z")), return_exceptions=True)
        assert isinstance(loaded, InvalidRequestError)
        assert str(loaded) == "the LoRA adapter /z.safetensors is refused: 2 workers died while they read it"
        assert failures(await read_until_done(events, 3)) == {"bad": InvalidRequestError}
        assert executor.num_starts == 3
        with pytest.raises(InvalidRequestError, match="the LoRA adapter 'z' is refused"):
            engine.add([request("again", "z")])
        with pytest.raises(InvalidRequestError, match="is refused"):
            await engine.load_adapter(key("z"))
        assert (executor.num_starts, resident(engine).num_held) == (3, 0)


async def test_a_load_that_is_cancelled_gives_its_place_to_the_next_at_once() -> None:
    executor = slow(max_loras=1, max_cpu_loras=1)
    async with running_engine(executor, max_loras=1, max_cpu_loras=1) as engine:
        load = asyncio.create_task(engine.load_adapter(key("a")))
        await until(lambda: bool(executor.runner.reading))  # type: ignore[attr-defined]
        waits = asyncio.create_task(engine.load_adapter(key("b")))
        await asyncio.sleep(0)
        executor.runner.finish("a")  # type: ignore[attr-defined]
        engine._wakeup.clear()  # the loop is idle when the load returns
        await load
        await until(lambda: key("b") in executor.runner.reading)  # type: ignore[attr-defined]
        executor.runner.finish("b")  # type: ignore[attr-defined]
        await waits


def test_an_adapter_that_one_rank_does_not_take_leaves_the_others() -> None:
    adapters = ResidentAdapters(make_config(), device_bytes=0)
    adapters.hold("1", [key("a")], lambda _: None)
    assert adapters.take_reads() == [key("a")]
    assert adapters.note_read(AdapterRead(key("a"), error=BAD)) == {"1": BAD}
    adapters.release("1")
    assert adapters.take_forgets() == [key("a")]


def test_a_request_that_waits_for_its_file_is_encoded_again_by_the_new_worker() -> None:
    scheduler = Scheduler(make_config(), make_ready())
    scheduler.add([make_scheduled("1", loras=loras("a"))])
    for _ in range(2):
        assert scheduler.adapters.take_reads() == [key("a")]
        plan = scheduler.schedule()
        assert plan is not None
        assert [each.request_id for each in plan.encode_early] == ["1"]
        scheduler.update(FakeRunner().execute(plan), 0.01)
        assert scheduler.schedule() is None
        scheduler.reset()


async def test_all_replicas_read_an_adapter_or_the_load_fails() -> None:
    executors = [slow(), slow()]
    async with running(executors) as replicas:
        for error in (None, BAD):
            load = asyncio.create_task(replicas.load_adapter(key("a")))
            await until(lambda: all(executor.runner.reading for executor in executors))  # type: ignore[attr-defined]
            executors[0].runner.finish("a")  # type: ignore[attr-defined]
            assert not load.done()
            executors[1].runner.finish("a", error)  # type: ignore[attr-defined]
            (outcome,) = await asyncio.gather(load, return_exceptions=True)
            assert isinstance(outcome, InvalidRequestError) == (error is not None)
            states = [resident(engine).state(key("a")) for engine in engines_of(replicas)]
            assert states == ["host", "disk" if error else "host"]
            replicas.forget_adapters(lambda each: each == key("a"))
            await until(lambda: not any(executor.runner.on_host for executor in executors))


async def test_a_lack_of_memory_drops_idle_adapters_and_the_request_runs_again() -> None:
    failed: list[str] = []

    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        if (request_id, phase) == ("2", "encode") and not failed:
            failed.append(request_id)
            return ItemError("no memory", "out_of_memory")
        return None

    executor = FakeExecutor(lambda: FakeRunner(errors=errors))
    async with running_engine(executor) as engine:
        assert not failures(await read_until_done(engine.add([request("1", "a")])))
        assert not failures(await read_until_done(engine.add([request("0", steps=9), request("2", "b")]), 2))
        assert failed
        assert [resident(engine).state(key(name)) for name in "ab"] == ["host", "device"]
        assert executor.runner.on_device == {key("b")}


def test_a_whole_pipeline_loads_in_a_step_and_encodes_nothing_ahead() -> None:
    scheduler = Scheduler(make_config(max_loras=1), make_ready(loads_adapters_in_steps=True))
    scheduler.add([make_scheduled("1", loras=loras("a"))])
    assert scheduler.schedule() is None
    assert scheduler.adapters.take_reads() == [key("a")]
    scheduler.note_adapter(AdapterRead(key("a")))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.load_adapters, plan.encode) == ([key("a")], [])
    scheduler.update(FakeRunner().execute(plan), 0.01)
    scheduler.note_adapter(AdapterRead(key("a")), in_step=True)
    runs = scheduler.schedule()
    assert runs is not None
    assert runs.encode == ["1"]


def test_a_load_waits_for_a_slot_and_goes_before_requests_that_wait_for_one() -> None:
    adapters = ResidentAdapters(make_config(**LIMITS), device_bytes=0, loads_in_steps=True)

    def read_and_hold(name: str) -> None:
        adapters.hold(name, [key(name)], lambda _: None)
        adapters.take_reads()
        adapters.note_read(AdapterRead(key(name), num_bytes=10))

    def load(*names: str) -> None:
        assert adapters.take_loads() == [key(name) for name in names]
        for name in names:
            adapters.note_read(AdapterRead(key(name)), in_step=True)

    read_and_hold("a")
    read_and_hold("b")
    load("a", "b")
    assert adapters.take_slots("a")
    assert adapters.take_slots("b")
    read_and_hold("c")
    assert (adapters.has_work, adapters.take_loads(), adapters.num_on_device) == (False, [], 2)
    adapters.hold("a again", [key("a")], lambda _: None)
    assert adapters.is_ready("a again")
    assert not adapters.take_slots("a again"), "it would keep the slot in use"
    adapters.release("a")
    assert adapters.has_work
    load("c")
    assert (adapters.take_drops(), adapters.num_on_device) == ([key("a")], 2)
    assert adapters.take_slots("c")
    assert not adapters.take_slots("a again"), "both slots are in use"
    adapters.release("b")
    assert adapters.take_slots("a again")
    assert adapters.num_on_device == 2


def test_adapters_that_a_whole_pipeline_loads_count_with_the_bytes_of_their_files() -> None:
    adapters = ResidentAdapters(make_config(), device_bytes=101, loads_in_steps=True)
    for number in range(12):
        name = f"{number}"
        adapters.hold(name, [key(name)], lambda _: None)
        adapters.take_reads()
        adapters.note_read(AdapterRead(key(name), num_bytes=10))
        assert adapters.take_loads() == [key(name)]
        adapters.note_read(AdapterRead(key(name)), in_step=True)
        assert adapters.take_slots(name)
        adapters.release(name)
    assert adapters.num_on_device == 10


def test_idle_adapters_take_more_than_their_slots_while_there_are_bytes() -> None:
    adapters = ResidentAdapters(make_config(), device_bytes=101)
    for number in range(12):
        name = f"{number}"
        adapters.hold(name, [key(name)], lambda _: None)
        assert adapters.take_reads() == [key(name)]
        adapters.note_read(AdapterRead(key(name), num_bytes=10))
        assert adapters.take_slots(name)
        adapters.release(name)
    assert adapters.num_on_device == 10
    assert adapters.take_drops() == [key("0"), key("1")]
    assert adapters.num_evictions == 2


def test_places_go_by_priority_and_then_by_arrival() -> None:
    adapters = ResidentAdapters(make_config(max_loras=1, max_cpu_loras=1), device_bytes=0)
    ready: list[str] = []
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1)):
        adapters.hold(name, [key(name)], ready.append, priority)
    for name in "adcb":
        assert adapters.take_reads() == [key(name)]
        adapters.note_read(AdapterRead(key(name), num_bytes=1))
        adapters.release(name)
    assert ready == list("adcb")


@pytest.mark.parametrize("loads_in_steps", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_random_events_keep_the_limits_and_end_all_requests(seed: int, loads_in_steps: bool) -> None:
    """The fake worker asserts the limits, that adapters are there when a request begins, and are not dropped in use."""
    rng = random.Random(seed)
    ready = make_ready(loads_adapters_in_steps=loads_in_steps)
    make_runner = partial(FakeRunner, make_config(**LIMITS), ready=ready)
    executor = FakeExecutor(make_runner, die_at={20, 60} if seed % 2 else ())
    async with running_engine(executor, **LIMITS, max_num_seqs=4) as engine:
        names = "abcdef"
        streams: list[tuple[str, Any]] = []
        loads: list[asyncio.Task[None]] = []
        for number in range(60):
            event = rng.choice(("add", "add", "add", "abort", "load", "forget", "pause"))
            if event == "add":
                chosen = "".join(rng.sample(names, rng.randrange(3)))
                streams.append((f"{number}", engine.add([request(f"{number}", chosen, rng.randrange(1, 6))])))
            elif event == "abort" and streams:
                engine.abort([rng.choice(streams)[0]])
            elif event == "load":
                loads.append(asyncio.create_task(engine.load_adapter(key(rng.choice(names)))))
            elif event == "forget":
                name = rng.choice(names)
                engine.forget_adapters(lambda each, name=name: each == key(name))  # type: ignore[misc]
            else:
                for _ in range(rng.randrange(30)):
                    await asyncio.sleep(0)
        assert not any(await asyncio.gather(*loads, return_exceptions=True))
        for request_id, events in streams:
            assert failures(await read_until_done(events)).keys() <= {request_id}
        adapters = resident(engine)
        assert (adapters.num_held, adapters.num_on_host <= 3, adapters.num_on_device <= 2) == (0, True, True)
        engine.forget_adapters(lambda each: True)
        await until(lambda: not (executor.runner.on_host or executor.runner.on_device))


def test_limits_are_checked() -> None:
    for settings, words in (
        ({"max_loras": 0}, "--max-loras takes an integer of at least 1, got 0"),
        ({"max_loras": 4, "max_cpu_loras": 3}, r"--max-cpu-loras takes at least --max-loras \(4\), got 3"),
        ({"max_cpu_loras": 3}, r"--max-cpu-loras takes at least --max-loras \(8\), got 3"),
        ({"lora_defaults": {"ink": {"lora_scale": 1}}}, "defaults of the LoRA adapter 'ink': unknown keys"),
        ({"lora_defaults": {"ink": {"num_inference_steps": "8"}}}, "num_inference_steps takes an integer, got '8'"),
        ({"lora_defaults": {"ink": 3}}, "takes defaults as names and values"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_config(**settings)
    sizes: Sequence[tuple[dict[str, Any], tuple[int, int]]] = (({}, (8, 32)), ({"max_loras": 40}, (40, 80)))
    for settings, wanted in sizes:
        config = make_config(**settings)
        assert (config.num_device_loras, config.num_host_loras) == wanted
