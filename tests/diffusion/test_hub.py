"""Hub models: the revision, the folder and the token that the settings name, at a hub on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.fake_hub import COMMITS, REPOSITORY, FakeHub, fake_hub
from vllm_omni.diffusion.hub import HubAccess
from vllm_omni.diffusion.registry import DEMO_MODEL_PATH, resolve_model_path
from vllm_omni.errors import ConfigError
from vllm_omni.omni import AsyncOmni

TOKEN = "hf_secret"
Serve = Callable[..., FakeHub]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in ("model_index.json", "vae/weights.safetensors", "vae/weights.bin", "pipeline.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def serve(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start the hub, and make its client know no other, no token and no cache but the test's."""
    hubs = []

    def start(token: str | None = None, folder: Path = model_folder) -> FakeHub:
        hubs.append(fake_hub(folder, token))
        hub = hubs[-1].__enter__()
        # As HF_ENDPOINT does it when the library is first imported.
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "")
    yield start
    for hub in hubs:
        hub.__exit__(None, None, None)


def names_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_the_main_revision_without_settings(serve: Serve, tmp_path: Path) -> None:
    serve()
    path = resolve_model_path(REPOSITORY)
    assert path.name == COMMITS["main"]
    assert path.is_relative_to(tmp_path / "cache")
    assert names_in(path) == {"model_index.json", "vae/weights.safetensors"}  # neither pickles nor code


def test_revision_download_dir_and_token_reach_the_hub(serve: Serve, tmp_path: Path) -> None:
    hub = serve(TOKEN)
    path = resolve_model_path(REPOSITORY, "auto", HubAccess("v1", str(tmp_path / "mine"), TOKEN))
    assert path.name == COMMITS["v1"]
    assert path.is_relative_to(tmp_path / "mine")
    assert names_in(path) == {"model_index.json", "vae/weights.safetensors", "version.json"}
    assert f"GET /api/models/{REPOSITORY}/revision/v1" in hub.requests


def test_a_commit_is_a_revision(serve: Serve) -> None:
    serve()
    assert resolve_model_path(REPOSITORY, "auto", HubAccess(COMMITS["v1"])).name == COMMITS["v1"]


def test_dummy_weights_need_none_from_the_hub(serve: Serve) -> None:
    serve()
    assert names_in(resolve_model_path(REPOSITORY, "dummy")) == {"model_index.json"}


def test_the_variable_hf_token_still_opens_a_private_model(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve_model_path(REPOSITORY).name == COMMITS["main"]


def test_offline_the_downloaded_revision_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve()
    path = resolve_model_path(REPOSITORY)
    num_requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model_path(REPOSITORY) == path
    assert len(hub.requests) == num_requests
    with pytest.raises(ConfigError, match=f"^model '{REPOSITORY}' .* outgoing traffic has been disabled"):
        resolve_model_path(REPOSITORY, "auto", HubAccess("v1"))


@pytest.mark.parametrize(
    ("token", "access", "words"),
    [
        (TOKEN, HubAccess(), ["neither a folder", "--hf-token or HF_TOKEN"]),
        (TOKEN, HubAccess(token="hf_wrong"), ["neither a folder", "--hf-token or HF_TOKEN"]),
        (None, HubAccess("v2"), ["--revision takes a branch, tag or commit", "'v2'", REPOSITORY]),
        (None, HubAccess(COMMITS["main"].replace("a", "c")), ["--revision takes", "'cccc", REPOSITORY]),
        (None, HubAccess(token=True), ["--hf-token without a value", "hf auth login"]),
        (None, HubAccess(download_dir=__file__), ["--download-dir takes a folder", __file__]),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_names_the_flag(
    token: str | None, access: HubAccess, words: list[str], serve: Serve
) -> None:
    serve(token)
    with pytest.raises(ConfigError) as caught:
        resolve_model_path(REPOSITORY, "auto", access)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert "hf_wrong" not in message


def test_a_hub_that_does_not_answer_is_one_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(ConfigError, match=f"^model '{REPOSITORY}' is neither .*ConnectError"):
        resolve_model_path(REPOSITORY)


def test_a_hub_model_in_another_layout_is_told(serve: Serve, model_folder: Path) -> None:
    (model_folder / "model_index.json").unlink()
    serve()
    with pytest.raises(ConfigError, match=f"^model '{REPOSITORY}' is not in the diffusers layout"):
        resolve_model_path(REPOSITORY)


def test_settings_of_the_engine_reach_the_hub(serve: Serve, tmp_path: Path) -> None:
    serve(TOKEN, DEMO_MODEL_PATH)
    settings = {"revision": "v1", "download_dir": str(tmp_path / "mine"), "hf_token": TOKEN, "load_format": "dummy"}
    path = AsyncOmni(model=REPOSITORY, **settings).info.path
    assert path.name == COMMITS["v1"]
    assert path.is_relative_to(tmp_path / "mine")


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_a_download_are_hidden_on_request(
    shown: bool, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve()
    resolve_model_path(REPOSITORY, "auto", HubAccess(progress_bar=shown))
    assert ("%|" in capsys.readouterr().err) is shown


@pytest.mark.parametrize("as_name", [str, lambda path: "demo"])
def test_a_folder_has_no_revision(as_name: Callable[[Path], str], model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--revision v1 is for hub models; '.*' is a folder, which has none"):
        resolve_model_path(as_name(model_folder), "auto", HubAccess("v1"))
