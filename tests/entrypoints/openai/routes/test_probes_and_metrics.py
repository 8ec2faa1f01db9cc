"""Routes for Kubernetes, Prometheus and SDKs: /health, /ready, /version, /v1/models, /metrics."""

from __future__ import annotations

import httpx
import openai
import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import vllm_omni
from testbed.fakes import NUM_PROMPT_TOKENS, make_request
from testbed.live_server import ALIAS, MODEL_NAME, STEPS, LiveServer, live_server
from testbed.patience import wait_for
from vllm_omni.diffusion.control.events import EngineStatus
from vllm_omni.diffusion.messages.plan import STAGES, StepPlan, StepResult
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver


def read_metrics(server: LiveServer) -> dict[str, float]:
    """`name{label=value}` without the model's name -> value; every sample but the process's must carry that name."""
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if not sample.name.startswith("process_"):
                assert sample.labels.pop("model_name") == MODEL_NAME
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items())
            values[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return values


def test_probes_of_a_warm_server(sdk: openai.OpenAI, http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "running"}
    assert http.get("/ready").json() == {"status": "running"}
    for path in ("/health", "/ready"):
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert http.get("/version").json() == {"version": vllm_omni.__version__}
    assert [model.id for model in sdk.models.list()] == [MODEL_NAME, ALIAS]
    assert sdk.models.retrieve(ALIAS).id == ALIAS
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")


def test_ping_is_health_as_in_vllm(http: httpx.Client) -> None:
    for method in ("GET", "POST", "HEAD"):
        assert http.request(method, "/ping").status_code == 200
    assert http.get("/ping").json() == http.get("/health").json()
    with live_server(start_engine=False) as running:
        assert [httpx.request(method, f"{running.url}/ping").status_code for method in ("GET", "POST")] == [503, 503]


def test_load_counts_requests_until_their_answers_end() -> None:
    def load() -> dict[str, int]:
        return httpx.get(f"{running.url}/load").json()  # type: ignore[no-any-return]

    with live_server() as running:
        assert load() == {"server_load": 0}
        running.call(running.device.pause)
        generations, chat = f"{running.url}/v1/images/generations", f"{running.url}/v1/chat/completions"
        messages = [{"role": "user", "content": "x"}]
        with (
            httpx.stream("POST", generations, json={"prompt": "x", "n": 3, "stream": True}) as first,
            httpx.stream("POST", chat, json={"messages": messages, "stream": True}),
        ):
            assert load() == {"server_load": 2}
            running.call(running.device.resume)
            assert len([line for line in first.iter_lines() if line.startswith("event: ")]) == 3
        wait_for(lambda: load() == {"server_load": 0})


def test_draining_server_is_healthy_but_not_ready() -> None:
    with live_server() as running:
        running.call(running.omni.begin_drain)
        assert httpx.get(f"{running.url}/health").status_code == 200
        ready = httpx.get(f"{running.url}/ready")
    assert ready.status_code == 503
    assert ready.json()["error"]["code"] == "unavailable"
    assert int(ready.headers["retry-after"]) >= 1


def test_ready_says_that_a_restarting_server_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_server() as running:
        monkeypatch.setattr(running.omni, "status", lambda: EngineStatus("restarting", 0, 0, 0.0, False))
        ready = httpx.get(f"{running.url}/ready")
    assert ready.status_code == 503
    assert int(ready.headers["retry-after"]) >= 1
    message = ready.json()["error"]["message"]
    assert message == "The workers restart: requests are queued and answered after that."


def test_nothing_is_promised_before_the_engine_is_warm() -> None:
    with live_server(start_engine=False) as running:
        for path in ("/health", "/ready", "/v1/models", f"/v1/models/{MODEL_NAME}"):
            response = httpx.get(running.url + path)
            assert response.status_code == 503, path
            assert response.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{running.url}/version").status_code == 200
        assert httpx.head(f"{running.url}/health").status_code == 503
        assert httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"}).status_code == 503
        assert read_metrics(running)["vllm_omni:requests_rejected_total{reason=unavailable}"] == 1


def test_no_created_series_here_and_the_users_registries_as_they_were(server: LiveServer) -> None:
    theirs = CollectorRegistry()
    Counter("theirs", "A counter of the program that this server is part of", registry=theirs)
    assert not [name for name in read_metrics(server) if name.endswith("_created")]
    assert b"theirs_created" in generate_latest(theirs)


def test_the_process_is_measured(server: LiveServer) -> None:
    values = read_metrics(server)
    measured = psutil.Process()
    assert 0 < values["process_resident_memory_bytes"] < psutil.virtual_memory().total
    assert abs(values["process_start_time_seconds"] - measured.create_time()) < 5
    assert 0 < values["process_cpu_seconds_total"] <= sum(measured.cpu_times()[:2]) + 1
    assert values["process_open_fds"] > 0


def test_metrics_exist_at_zero_and_count() -> None:
    with live_server(max_num_queued_reqs=4) as running:
        url = f"{running.url}/v1/images/generations"
        before = read_metrics(running)
        httpx.post(url, json={"prompt": "x", "n": 3, "size": "64x128", "seed": 1})
        httpx.post(url, json={"prompt": "fail-at-2"})
        assert httpx.post(url, json={"prompt": "x", "n": 5}).status_code == 400  # never fits: not a full queue
        for wrong in (b'{"prompt": ', b"\xff\xfe", b'{"prompt": "x", "n": 0}', b'{"prompt": "x", "size": "65x64"}'):
            refused = httpx.post(url, content=wrong, headers={"content-type": "application/json"})
            assert refused.status_code == 400
        running.call(running.omni.begin_drain)
        httpx.post(url, json={"prompt": "x"})
        after = read_metrics(running)
    grown = {name: after[name] - before[name] for name in before}
    expected = {
        "vllm_omni:request_success_total{reason=completed}": 3,
        "vllm_omni:requests_failed_total": 1,
        "vllm_omni:requests_aborted_total": 0,
        "vllm_omni:requests_rejected_total{reason=queue_full}": 0,
        "vllm_omni:requests_rejected_total{reason=unavailable}": 1,
        "vllm_omni:requests_rejected_total{reason=invalid}": 5,
        "vllm_omni:requests_rejected_total{reason=too_many_jobs}": 0,
        "vllm_omni:requests_rejected_total{reason=store_full}": 0,
        "vllm_omni:requests_replayed_total": 0,
        "vllm_omni:worker_restarts_total": 0,
        "vllm_omni:images_total": 3,
        "vllm_omni:image_pixels_total": 3 * 64 * 128,
        "vllm_omni:inference_steps_total{kind=computed}": 3 * STEPS + 1,
        "vllm_omni:inference_steps_total{kind=cached}": 0,
        "vllm_omni:e2e_request_latency_seconds_count": 3,
        "vllm_omni:request_queue_time_seconds_count": 3,
        "vllm_omni:stage_time_seconds_count{stage=text_encode}": 3,
        "vllm_omni:stage_time_seconds_count{stage=denoise}": 3,
        "vllm_omni:stage_time_seconds_count{stage=vae_decode}": 3,
        "vllm_omni:stage_time_seconds_count{stage=media_encode}": 3,
        "vllm_omni:step_batch_sequences_sum": 3 * STEPS + 1,
        "vllm_omni:step_batch_tokens_sum": 3 * STEPS * (32 + NUM_PROMPT_TOKENS) + 16 + NUM_PROMPT_TOKENS,
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm_omni:queue_work_seconds": 0,
        "vllm_omni:peak_memory_bytes": 0,
    }
    assert {name: grown[name] for name in expected} == expected
    assert grown["vllm_omni:denoise_step_seconds_count"] >= STEPS


def test_cached_steps_and_what_caches_keep_are_shown() -> None:
    observer = PrometheusObserver(MODEL_NAME)
    result = StepResult(0, advanced=["a", "b", "c"], cached={"a": 1.0, "b": 0.5}, cache_bytes=700)
    observer.on_step(StepPlan(0), result, 0.1)
    observer.on_step(StepPlan(1), StepResult(1, advanced=["a"], cache_bytes=300), 0.1)
    text = observer.render().decode()
    samples = {
        (sample.name, sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["vllm_omni:inference_steps_total", "computed"] == 2.5
    assert samples["vllm_omni:inference_steps_total", "cached"] == 1.5
    assert samples["vllm_omni:cache_state_bytes", None] == 300


def test_queue_gauges_follow_the_engine() -> None:
    with live_server(max_num_seqs=1, max_num_queued_reqs=3) as running:
        running.call(running.device.pause)
        with (
            httpx.Client() as client,
            client.stream("POST", f"{running.url}/v1/images/generations", json={"prompt": "x", "n": 3, "stream": True}),
        ):
            assert httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"}).status_code == 429
            values = read_metrics(running)
        running.wait_until(lambda: running.num_unfinished() == 0)
        after = read_metrics(running)
    assert values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"] == 3
    assert values["vllm_omni:requests_rejected_total{reason=queue_full}"] == 1
    assert values["vllm_omni:queue_work_seconds"] > 0
    assert after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"] == 0
    assert after["vllm_omni:requests_aborted_total"] == 3


def test_worker_restarts_are_counted() -> None:
    observer = PrometheusObserver("m")
    observer.on_worker_restart(5)
    text = observer.render().decode()
    assert 'vllm_omni:worker_restarts_total{model_name="m"} 1.0' in text
    assert 'vllm_omni:requests_replayed_total{model_name="m"} 5.0' in text


def test_video_jobs_frames_and_checkpoints_are_shown() -> None:
    observer = PrometheusObserver("m")
    timings = {**dict.fromkeys(STAGES, 1.0), "total": 4.0, "queue": 1.0}
    observer.on_finish(make_request(num_frames=17), timings, "completed", "")
    observer.on_finish(make_request(), timings, "completed", "")
    observer.on_job_counts({"queued": 2, "in_progress": 1, "completed": 0, "failed": 0})
    observer.on_job_counts({"queued": 0, "in_progress": 1, "completed": 1, "failed": 0})
    observer.on_video_encoded(0.5)
    observer.on_checkpoint_stored(0.25, 1000)
    text = observer.render().decode()
    for line in (
        'vllm_omni:video_frames_total{model_name="m"} 17.0',
        'vllm_omni:images_total{model_name="m"} 1.0',
        'vllm_omni:video_jobs{model_name="m",status="queued"} 0.0',
        'vllm_omni:video_jobs{model_name="m",status="completed"} 1.0',
        'vllm_omni:stage_time_seconds_sum{model_name="m",stage="media_encode"} 0.5',
        'vllm_omni:checkpoint_store_seconds_sum{model_name="m"} 0.25',
        'vllm_omni:checkpoint_bytes_total{model_name="m"} 1000.0',
    ):
        assert line in text.splitlines()


def test_the_attention_of_each_replica_is_shown() -> None:
    observer = PrometheusObserver("m")
    observer.watch(lambda: EngineStatus("running", 0, 0, 0.0, True, ("cudnn", "sdpa")))
    lines = observer.render().decode().splitlines()
    assert [line for line in lines if line.startswith("vllm_omni:engine_info{")] == [
        'vllm_omni:engine_info{attention_backend="cudnn",model_name="m"} 1.0',
        'vllm_omni:engine_info{attention_backend="sdpa",model_name="m"} 1.0',
    ]


def test_memory_is_the_most_of_any_device() -> None:
    """Replicas report in turn, and a restarted worker counts from 0."""
    observer = PrometheusObserver("m")
    for peak in (5, 9, 7, 0):
        observer.on_step(StepPlan(0), StepResult(0, peak_memory_bytes=peak), 0.1)
    assert 'vllm_omni:peak_memory_bytes{model_name="m"} 9.0' in observer.render().decode()
