"""The command itself, as a process, on the embedded demo model, with real clients."""

from __future__ import annotations

import base64
import datetime
import io
import ipaddress
import os
import re
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from testbed.patience import GUARD_SECONDS, wait_for
from tests.entrypoints.cli.server_process import (
    VLLM,
    ServerProcess,
    num_running,
    server_process,
    start_generation,
    stop,
)

KEY = "correct horse"
PATIENCE = f"{GUARD_SECONDS:g}"
ORIGIN = "https://app.example"
LOCALHOST = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def self_signed(folder: Path, subject: x509.GeneralName = LOCALHOST) -> tuple[Path, Path]:
    """(key file, certificate file)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([subject]), False)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key_file, certificate_file = folder / "key.pem", folder / "certificate.pem"
    key_file.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    certificate_file.write_bytes(certificate.public_bytes(encoding))
    return key_file, certificate_file


@dataclass
class Shared:
    """A server and how to talk to it."""

    process: ServerProcess
    url: str
    tls: ssl.SSLContext

    def client(self, key: str = KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, verify=self.tls)

    def sdk(self, key: str = KEY) -> openai.OpenAI:
        client = openai.DefaultHttpxClient(verify=self.tls)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=client)


@contextmanager
def serving(folder: Path) -> Iterator[Shared]:
    """A server with every flag that can share one: starting it costs more than all its tests."""
    key, certificate = self_signed(folder)
    with server_process(
        *("--host", "127.0.0.1", "--port", "0", "--api-key", KEY, "--root-path", "/omni/"),
        *("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--shutdown-timeout", PATIENCE),
        *("--served-model-name", "gpt-image-1", "demo", "--allowed-origins", f'["{ORIGIN}"]'),
        *("--middleware", "starlette.middleware.gzip.GZipMiddleware"),
        *("--default-sampling-params", '{"num_inference_steps": 4}'),
    ) as process:
        shared = Shared(process, process.address(), ssl.create_default_context(cafile=certificate))
        assert shared.url.startswith("https://127.0.0.1:")
        process.wait_until_ready()
        yield shared


class Servers:
    """One server for all tests, and another where a test has ended it."""

    def __init__(self, make_folder: Callable[[str], Path], stack: ExitStack) -> None:
        self._make_folder = make_folder
        self._stack = stack
        self._running: Shared | None = None

    def running(self) -> Shared:
        if self._running is None or not self._running.process.is_running:
            self._running = self._stack.enter_context(serving(self._make_folder("tls")))
        return self._running


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp, stack)


@pytest.fixture
def server(servers: Servers) -> Shared:
    return servers.running()


@pytest.fixture
def client(server: Shared) -> Iterator[httpx.Client]:
    with server.client() as http:
        yield http


def test_the_sdk_gets_the_picture_that_the_prompt_asks_for(server: Shared) -> None:
    with server.sdk() as sdk:
        answer = sdk.images.generate(model="demo", prompt="a red apple on a white background", extra_body={"seed": 7})
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert (picture.format, f"{picture.width}x{picture.height}") == ("PNG", answer.size)
    pixels = picture.convert("RGB")
    red, green, blue = pixels.getpixel((picture.width // 2, picture.height * 3 // 5))
    assert red > 120
    assert red - max(green, blue) > 40, "an apple in the middle"
    assert min(pixels.getpixel((1, 1))) > 200, "on white"


def test_the_key_is_asked_for_with_an_error_object(server: Shared) -> None:
    with server.sdk(key="wrong") as sdk:
        with pytest.raises(openai.AuthenticationError) as refused:
            sdk.images.generate(model="demo", prompt="red apple")
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
        assert "API key" in refused.value.body["message"]
        assert refused.value.response.headers["x-request-id"]
    with server.client(key="wrong") as client:
        guarded = ("/v1/models", "/omni/v1/models", "/v1/images/files/x", "/v1/nothing")
        assert {path: client.get(path).status_code for path in guarded} == dict.fromkeys(guarded, 401)
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert client.get(path).status_code == 200


def test_served_names(client: httpx.Client) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [
        "gpt-image-1",
        "demo",
        "night",
        "lighthouse",
        "fast",
    ]
    assert 'model_name="gpt-image-1"' in client.get("/metrics").text
    body = {"model": "night", "prompt": "red apple", "num_inference_steps": 8, "seed": 7}
    answer = client.post("/v1/images/generations", json=body).json()
    night = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")
    assert max(night.getpixel((1, 1))) < 180, "the adapter, not the model, which draws on white"


def test_root_path(client: httpx.Client) -> None:
    """With or without the proxy's prefix; links carry it."""
    assert client.get("/omni/v1/models").status_code == 200
    answer = client.post("/v1/images/generations", json={"prompt": "red apple", "response_format": "url"}).json()
    assert "/omni/v1/images/files/" in answer["data"][0]["url"]
    assert client.get("/omni/openapi.json").json()["servers"] == [{"url": "/omni"}]


def test_the_documentation_page(client: httpx.Client) -> None:
    """vLLM's copy of Swagger UI, which asks for the key."""
    page = client.get("/omni/docs").text
    for file in re.findall(r'(?:src|href)="(/[^"]*)"', page):
        assert file.startswith("/omni/docs/swagger-ui")
        assert len(client.get(file).content) > 100_000
    schema = client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "A key of --api-key."}
    }
    operation = schema["paths"]["/v1/images/generations"]["post"]
    assert operation["security"] == [{"ApiKey": []}]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v1/images/generations/", json=example).status_code == 200


def test_cors_also_for_refusals(client: httpx.Client) -> None:
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    allowed = client.options("/v1/images/generations", headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert allowed.headers["x-request-id"]
    refused = client.get("/v1/models", headers={"Origin": ORIGIN, "Authorization": "Bearer wrong"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    assert "x-omni-ignored-fields" in refused.headers["access-control-expose-headers"]
    stranger = client.get("/v1/models", headers={"Origin": "https://else.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_the_users_middleware_and_request_ids(client: httpx.Client) -> None:
    assert client.get("/metrics").headers["content-encoding"] == "gzip"
    assert len(client.get("/health").headers["x-request-id"]) == 32
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_is_replaced(server: Shared, client: httpx.Client, number: int) -> None:
    """Its request takes longer, and nothing else."""
    num_replayed = replayed(client)
    before = start_generation(client, 4)
    before.join()
    (worker,) = server.process.workers()
    worker.suspend()
    again = start_generation(client, 4)
    wait_for(lambda: num_running(client))
    worker.send_signal(number)
    wait_for(lambda: client.get("/health").status_code == 503)
    assert client.get("/metrics").status_code == 200, "the API stays up"
    again.join()
    assert again.response.status_code == 200
    assert replayed(client) == num_replayed + 1
    assert client.get("/health").status_code == 200
    (replacement,) = server.process.workers()
    assert replacement.pid != worker.pid
    assert again.response.json()["data"] == before.response.json()["data"], "the same seed, the same picture"


def replayed(client: httpx.Client) -> float:
    found = re.search(r"^vllm_omni:requests_replayed_total\{.*\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_sigterm_finishes_what_runs_and_refuses_the_rest(server: Shared, client: httpx.Client) -> None:
    """The worker stands still until the rest is refused."""
    (worker,) = server.process.workers()
    worker.suspend()
    generation = start_generation(client, 4)
    wait_for(lambda: num_running(client))
    server.process.signal(signal.SIGTERM)
    wait_for(lambda: client.get("/ready").status_code == 503)
    refused = client.post("/v1/images/generations", json={"prompt": "red apple"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    assert int(refused.headers["retry-after"]) >= 1
    worker.resume()
    generation.join()
    assert generation.response.status_code == 200
    picture = base64.b64decode(generation.response.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(picture)).size == (64, 64)
    assert server.process.wait() == 0
    assert server.process.survivors() == []


@pytest.mark.thorough
def test_a_second_signal_on_a_unix_socket_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "omni.sock"
    with server_process("--uds", str(path), "--shutdown-timeout", PATIENCE, "--disable-uvicorn-access-log") as server:
        assert server.address() == f"unix:{path}"
        server.wait_until_ready()
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(base_url="http://server", transport=transport) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "demo"
            (worker,) = server.workers()
            worker.suspend()
            body = {"prompt": "red apple", "stream": True}
            with client.stream("POST", "/v1/images/generations", json=body) as unanswered:
                assert unanswered.status_code == 200
                server.signal(signal.SIGTERM)
                wait_for(lambda: client.get("/ready").status_code == 503)
                server.signal(signal.SIGTERM)
                assert server.wait() == 128 + signal.SIGTERM
        assert server.survivors() == []
        assert not path.exists()
    _, told = server.output.split("SIGTERM: refusing new requests", 1)
    lines = [line for line in told.splitlines()[1:] if "Running: " not in line]
    assert len(lines) == 1, lines
    assert "SIGTERM: ending at once" in lines[0]


@pytest.mark.thorough
def test_the_model_in_the_servers_own_process() -> None:
    flags = ("--host", "127.0.0.1", "--port", "0", "--distributed-executor-backend", "uni")
    with server_process(*flags) as server:
        url = server.address()
        server.wait_until_ready()
        assert server.workers() == []
        with httpx.Client(base_url=url) as client:
            generation = start_generation(client, 2)
            generation.join()
            assert generation.response.status_code == 200
        server.wait_for_line(r"Request \S+-0 completed: 64x64, 2 of 2 steps computed, 0 cached; \d+\.\d\d s queued, ")
        assert "red apple" not in server.output
        assert stop(server) == 0


@pytest.mark.thorough
def test_a_server_that_loads_says_so_and_a_signal_ends_it_in_good_order() -> None:
    with server_process("--host", "127.0.0.1", "--port", "0") as server:
        (worker,) = wait_for(server.workers)
        worker.suspend()
        with httpx.Client(base_url=server.address()) as client:
            early = {path: client.get(path) for path in ("/health", "/ready", "/v1/models")}
        assert {path: answer.status_code for path, answer in early.items()} == dict.fromkeys(early, 503)
        assert int(early["/ready"].headers["retry-after"]) >= 1
        assert stop(server) == 0
        assert server.survivors() == []


@pytest.mark.thorough
def test_too_many_deaths_end_the_server_with_an_error() -> None:
    with server_process("--host", "127.0.0.1", "--port", "0", "--max-worker-restarts", "0") as server:
        server.wait_until_ready()
        (worker,) = server.workers()
        worker.kill()
        assert server.wait() == 1
        assert server.survivors() == []
        died, stopping = [line for line in server.output.splitlines() if "ERROR" in line]
    cause = f"rank 0 (pid {worker.pid}) was killed by signal 9"
    assert cause in died
    assert stopping.endswith(
        f"Stopping: worker deaths within 600 s: 1, --max-worker-restarts allows 0; the last one: {cause}"
    )


@pytest.mark.thorough
def test_a_wrong_value_ends_the_command_with_one_line() -> None:
    ended = subprocess.run(
        [VLLM, "serve", "demo", "--omni"],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "LOUD"},
    )
    assert ended.returncode == 2
    wanted = "VLLM_LOGGING_LEVEL takes DEBUG, INFO, WARNING, ERROR or CRITICAL, got 'LOUD'"
    assert ended.stderr.splitlines()[-1] == f"vllm-omni: error: {wanted}"
    assert "Traceback" not in ended.stderr + ended.stdout
