"""The deployment files start the server that they describe."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_omni.diffusion.compute.worker.main import CODE_FOLDERS, keep_compiled_code
from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.args import parse_args

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["kubernetes", "videos"])
def deployment(request: pytest.FixtureRequest) -> dict[str, Any]:
    kinds = {part["kind"]: part for part in yaml.safe_load_all((ROOT / f"deploy/{request.param}.yaml").read_text())}
    assert kinds["Service"]["spec"]["selector"] == kinds["Deployment"]["spec"]["selector"]["matchLabels"]
    assert kinds["Deployment"]["spec"]["template"]["metadata"]["labels"] == kinds["Service"]["spec"]["selector"]
    template: dict[str, Any] = kinds["Deployment"]["spec"]["template"]
    return template


def test_the_pods_command_line_parses_and_its_ports_agree(deployment: dict[str, Any]) -> None:
    (container,) = deployment["spec"]["containers"]
    args = parse_args(["serve", *container["args"]])
    is_shared = args.videos.job_store is not None
    assert args.config.model == ("demo-video" if is_shared else "demo")
    assert is_shared == (args.videos.media_store is not None) == ("envFrom" in container)
    assert {"name": "http", "containerPort": args.http.port} in container["ports"]
    assert deployment["metadata"]["annotations"]["prometheus.io/port"] == str(args.http.port)


def test_the_pod_is_given_the_time_that_draining_takes(deployment: dict[str, Any]) -> None:
    (container,) = deployment["spec"]["containers"]
    timeout = parse_args(["serve", *container["args"]]).http.shutdown_timeout
    (_, pre_stop) = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(pre_stop) + serve.StopLimits().total(timeout)
    assert deployment["spec"]["terminationGracePeriodSeconds"] >= needed


def test_probes(deployment: dict[str, Any]) -> None:
    (container,) = deployment["spec"]["containers"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}


def test_the_images_command_line_parses_and_its_files_exist() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    words = {name: json.loads(value) for name, value in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", dockerfile, re.M)}
    assert words["ENTRYPOINT"][0].endswith("/bin/vllm")
    args = parse_args([*words["ENTRYPOINT"][1:], *words["CMD"]])
    assert f"EXPOSE {args.http.port}" in dockerfile
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for word in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_pod_keeps_what_it_compiled(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = deployment["spec"]["containers"]
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", *CODE_FOLDERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/omni")
    keep_compiled_code()
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = [volume["name"] for volume in deployment["spec"]["volumes"]]
    assert all(mounts[str(Path(os.environ.pop(variable)).parent)] in volumes for variable in CODE_FOLDERS)
