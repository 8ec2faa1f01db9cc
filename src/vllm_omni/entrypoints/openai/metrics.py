"""Prometheus metrics: an observer counts what the engine reports, and `/metrics` shows the counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from vllm_omni.diffusion.control.events import EngineObserver, EngineStatus
from vllm_omni.diffusion.messages.plan import EXCHANGES, STAGES, StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.adapters import AdapterState, AdapterStats
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.records import JobStatus

_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_TOKEN_BUCKETS = tuple(2**i for i in range(6, 19))

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the levels of sleep, by level."""


class PrometheusObserver(EngineObserver, VideoObserver):
    """An `EngineObserver` and `VideoObserver` with its own registry.

    All metrics have the label `model_name`, except `process_*`, which describe the server's process.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._status: Callable[[], EngineStatus] | None = None
        self._num_dropped: Callable[[], int] | None = None
        self._adapter_stats: Callable[[], AdapterStats] | None = None
        ProcessCollector(registry=self._registry)
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to pixels", _LATENCY_BUCKETS)
        self._queue_time = self._histogram("request_queue_time_seconds", "Waiting before work", _LATENCY_BUCKETS)
        self._stage_time = Histogram(
            "vllm_omni:stage_time_seconds",
            "Time of one picture in each stage",
            ("model_name", "stage"),
            registry=self._registry,
            buckets=_LATENCY_BUCKETS,
        )
        for stage in (*STAGES, "media_encode"):
            self._stage_time.labels(model_name, stage)
        self._step_time = self._histogram("denoise_step_seconds", "One denoising step of the device", _STEP_BUCKETS)
        self._step_sequences = self._histogram("step_batch_sequences", "Sequences in one step", _SEQUENCE_BUCKETS)
        self._step_tokens = self._histogram("step_batch_tokens", "Tokens in one step", _TOKEN_BUCKETS)
        self._success = self._counter("request_success", "Pictures delivered", reason=("completed",))
        self._failed = self._counter("requests_failed", "Pictures that failed")
        reasons = ("queue_full", "unavailable", "invalid", "too_many_jobs", "store_full")
        self._rejected = self._counter("requests_rejected", "Refused", reason=reasons)
        self._aborted = self._counter("requests_aborted", "Cancelled, or the client left")
        self._replayed = self._counter("requests_replayed", "Run again after a worker died")
        self._images = self._counter("images", "Pictures made")
        self._pixels = self._counter("image_pixels", "Pixels of pictures made")
        self._video_frames = self._counter("video_frames", "Frames of videos made")
        self._video_jobs = Gauge(
            "vllm_omni:video_jobs", "Video jobs in the store", ("model_name", "status"), registry=self._registry
        )
        self._checkpoint_time = self._histogram(
            "checkpoint_store_seconds", "Writing one checkpoint of a video to the media store", _LATENCY_BUCKETS
        )
        self._checkpoint_bytes = self._counter("checkpoint_bytes", "Bytes of checkpoints written to the media store")
        self._steps = self._counter("inference_steps", "Denoising steps of requests", kind=("computed", "cached"))
        self._text_tasks = self._counter("chat_text_tasks", "Text tasks of chat front ends answered with empty text")
        self._sent = self._counter(
            "communication_bytes", "Bytes that ranks handed to each kind of exchange", collective=EXCHANGES
        )
        self._restarts = self._counter("worker_restarts", "Worker restarts")
        self._cache_bytes = self._gauge("cache_state_bytes", "Kept by step caches on one device")
        self._most_memory = 0
        self._peak_memory = self._gauge("peak_memory_bytes", "Most memory used on one device")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm_omni:{name}", text, ("model_name",), registry=self._registry, buckets=buckets)
        return metric.labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm_omni:{name}", text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _counter(self, name: str, text: str, **label: tuple[str, ...]) -> dict[str, Counter]:
        """Counters for the values of at most one further label; all exist from the start, at 0."""
        metric = Counter(f"vllm_omni:{name}", text, ("model_name", *label), registry=self._registry)
        if not label:
            return {"": metric.labels(self._model_name)}
        (values,) = label.values()
        return {value: metric.labels(self._model_name, value) for value in values}

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        if result.advanced:
            self._step_time.observe(result.denoise_seconds)
            self._step_sequences.observe(result.num_sequences)
            self._step_tokens.observe(result.num_tokens)
            cached = sum(result.cached.values())
            self._steps["computed"].inc(sum(map(result.num_made, result.advanced)) - cached)
            self._steps["cached"].inc(cached)
        self._cache_bytes.set(result.cache_bytes)
        for collective, num_bytes in result.sent_bytes.items():
            self._sent[collective].inc(num_bytes)
        if result.peak_memory_bytes > self._most_memory:  # the maximum of all replicas, also over restarts
            self._most_memory = result.peak_memory_bytes
            self._peak_memory.set(self._most_memory)

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        if outcome in ("refused", "given back"):
            return  # refusals are counted by `on_reject`; a job that is given back runs again
        if outcome != "completed":
            (self._aborted if outcome == "aborted" else self._failed)[""].inc()
            return
        self._success["completed"].inc()
        if request.num_frames > 1:
            self._video_frames[""].inc(request.num_frames)
        else:
            self._images[""].inc()
            self._pixels[""].inc(request.height * request.width)
        self._latency.observe(timings["total"])
        self._queue_time.observe(timings["queue"])
        for stage in STAGES:
            self._stage_time.labels(self._model_name, stage).observe(timings[stage])

    def on_reject(self, reason: str) -> None:
        self._rejected[reason].inc()

    def on_job_refused(self, reason: str) -> None:
        self.on_reject(reason)

    def on_worker_restart(self, num_replayed: int) -> None:
        self._restarts[""].inc()
        self._replayed[""].inc(num_replayed)

    def on_encoded(self, seconds: float) -> None:
        """A picture was encoded for its answer."""
        self._stage_time.labels(self._model_name, "media_encode").observe(seconds)

    def on_video_encoded(self, seconds: float) -> None:
        self.on_encoded(seconds)

    def on_checkpoint_stored(self, seconds: float, num_bytes: int) -> None:
        self._checkpoint_time.observe(seconds)
        self._checkpoint_bytes[""].inc(num_bytes)

    def on_job_counts(self, counts: Mapping[JobStatus, int]) -> None:
        for status, number in counts.items():
            self._video_jobs.labels(self._model_name, status).set(number)

    def on_text_task(self) -> None:
        """A text task of a chat front end was answered with empty text."""
        self._text_tasks[""].inc()

    def watch_log(self, num_dropped: Callable[[], int]) -> None:
        """Show the number of log lines that could not be written; `num_dropped` is called at each scrape."""
        self._num_dropped = num_dropped

    def watch_adapters(self, stats: Callable[[], AdapterStats]) -> None:
        """Show where adapters are, and their loads; `stats` is called at each scrape."""
        self._adapter_stats = stats

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Show the engine's queue; `status` is called at each scrape."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Metrics that are read at each scrape: prometheus_client calls this."""
        if self._num_dropped is not None:
            text = "Log lines of this process that could not be written"
            lines = CounterMetricFamily("vllm_omni:log_lines_dropped", text, labels=("model_name",))
            lines.add_metric((self._model_name,), self._num_dropped())
            yield lines
        if self._adapter_stats is not None:
            yield from self._adapter_metrics(self._adapter_stats())
        if self._status is None:
            return
        status = self._status()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests under way", status.num_running),
            ("vllm:num_requests_waiting", "Requests that wait", status.num_waiting),
            ("vllm_omni:queue_work_seconds", "Time until all work is done", status.queue_seconds),
        ):
            family = GaugeMetricFamily(name, text, labels=("model_name",))
            family.add_metric((self._model_name,), value)
            yield family
        sleep = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 for the state of the engine", labels=("model_name", "sleep_state")
        )
        for level, name in enumerate(SLEEP_STATES):
            sleep.add_metric((self._model_name, name), float(level == status.sleep_level))
        yield sleep
        info = GaugeMetricFamily(
            "vllm_omni:engine_info", "1 for what replicas run with", labels=("model_name", "attention_backend")
        )
        for name in status.attention_backends:
            info.add_metric((self._model_name, name), 1)
        yield info

    def _adapter_metrics(self, stats: AdapterStats) -> Iterator[Metric]:
        name = (self._model_name,)
        states = GaugeMetricFamily(
            "vllm_omni:lora_adapters", "Adapters that requests may name", labels=("model_name", "state")
        )
        for state in get_args(AdapterState):
            states.add_metric((*name, state), stats.states.get(state, 0))
        yield states
        for metric, text, value in (
            ("lora_loads", "Files of adapters that were read", stats.loads),
            ("lora_evictions", "Adapters dropped to make room for others", stats.evictions),
        ):
            counter = CounterMetricFamily(f"vllm_omni:{metric}", text, labels=("model_name",))
            counter.add_metric(name, value)
            yield counter
        seconds = SummaryMetricFamily("vllm_omni:lora_load_seconds", "Reading one adapter", labels=("model_name",))
        seconds.add_metric(name, stats.loads, stats.load_seconds)
        yield seconds

    def render(self) -> bytes:
        return bytes(generate_latest(_WithoutCreated(self._registry)))


class _WithoutCreated:
    """The metrics of `registry` without their `_created` series, which double the number of series.

    prometheus_client's own switch for them changes every registry of the process, also those of the user's middleware.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
