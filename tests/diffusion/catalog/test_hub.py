"""Hub models: the revision, the folder and the token that the settings name, at a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.broken_folders import Breakage, values
from tests.fake_hub import COMMITS, REPOSITORY, FakeHub, fake_hub
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH, EMBEDDED_MODELS, find_folder
from vllm_omni.diffusion.catalog.hub import DEFAULT_ACCESS, HubAccess
from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.omni import AsyncOmni

TOKEN = "hf_secret"
CONFIGS = {
    "model_index.json",
    "default_sampling_params.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.txt",
    "tokenizer/spiece.model",
    "tokenizer/chat_template.jinja",
    "tokenizer/additional_chat_templates/tools.jinja",
}
PLAIN = {
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
}
HALF = {
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.safetensors.index.fp16.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
}
NEEDED = CONFIGS | PLAIN
SURPLUS = {
    "README.md",
    "assets/picture.png",
    "whole.safetensors",
    "pipeline.py",
    "config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/modeling.py",
    "vae/model.onnx",
    "text_encoder/pytorch_model.bin.index.json",
    "text_encoder/model-00003-of-00003.safetensors",
    "unused/config.json",
    "safety_checker/model.safetensors",
}
Serve = Callable[..., FakeHub]


def resolve_model_path(model: str, load_format: LoadFormat = "auto", access: HubAccess = DEFAULT_ACCESS) -> Path:
    """The folder of a model whose configs are accepted whatever they say."""
    return find_folder(model, load_format, access, lambda path: None).path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A repository with both variants of all weights, and with much that is not loaded."""
    folder = tmp_path / "model"
    index = {
        "_class_name": "SomePipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "safety_checker": [None, None],
    }
    for name in (*NEEDED, *HALF, *SURPLUS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("", ".fp16"):
        shards = {"a": f"model{part}-00001-of-00002.safetensors", "b": f"model{part}-00002-of-00002.safetensors"}
        weight_map = json.dumps({"weight_map": shards})
        (folder / f"text_encoder/model.safetensors.index{part}.json").write_text(weight_map)
    return folder


@pytest.fixture
def serve(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start the hub, and make its client know no other, no token and no cache but the test's."""
    hubs = []

    def start(token: str | None = None, folder: Path = model_folder) -> FakeHub:
        hubs.append(fake_hub(folder, token))
        hub = hubs[-1].__enter__()
        # HF_ENDPOINT has the same effect when the library is first imported.
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
    assert names_in(path) == NEEDED  # neither pickles nor code


def test_revision_download_dir_and_token_reach_the_hub(serve: Serve, tmp_path: Path) -> None:
    hub = serve(TOKEN)
    path = resolve_model_path(REPOSITORY, "auto", HubAccess("v1", str(tmp_path / "mine"), TOKEN))
    assert path.name == COMMITS["v1"]
    assert path.is_relative_to(tmp_path / "mine")
    assert names_in(path) == NEEDED
    assert f"GET /api/models/{REPOSITORY}/revision/v1" in hub.requests


def test_a_commit_is_a_revision(serve: Serve) -> None:
    serve()
    assert resolve_model_path(REPOSITORY, "auto", HubAccess(COMMITS["v1"])).name == COMMITS["v1"]


def test_dummy_weights_need_none_from_the_hub(serve: Serve) -> None:
    serve()
    assert names_in(resolve_model_path(REPOSITORY, "dummy")) == CONFIGS


@pytest.mark.parametrize(("variant", "weights"), [(None, PLAIN), ("fp16", HALF)])
def test_only_files_that_are_loaded_are_fetched(
    variant: str | None, weights: set[str], serve: Serve, model_folder: Path
) -> None:
    hub = serve()
    path = resolve_model_path(REPOSITORY, "auto", HubAccess(variant=variant))
    assert names_in(path) == CONFIGS | weights
    assert hub.num_bytes == {name: (model_folder / name).stat().st_size for name in CONFIGS | weights}


def test_a_component_without_the_variant_is_fetched_without_it(serve: Serve, model_folder: Path) -> None:
    (model_folder / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    serve()
    path = resolve_model_path(REPOSITORY, "auto", HubAccess(variant="fp16"))
    plain_vae, half_vae = (f"vae/diffusion_pytorch_model{part}.safetensors" for part in ("", ".fp16"))
    assert names_in(path) == CONFIGS | HALF - {half_vae} | {plain_vae}


def test_shards_are_those_that_the_index_names(serve: Serve, model_folder: Path) -> None:
    index = model_folder / "text_encoder/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "rest.safetensors"}}')
    (model_folder / "text_encoder/rest.safetensors").touch()
    serve()
    added, left = "text_encoder/rest.safetensors", "text_encoder/model-00002-of-00002.safetensors"
    assert names_in(resolve_model_path(REPOSITORY)) == NEEDED - {left} | {added}


def test_weights_that_a_single_file_replaces_are_not_fetched(
    serve: Serve, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither now nor by the earlier download that serves while the hub is away; without variant files as well."""
    values("model_index.json", transformer=["diffusers", "Transformer"])(model_folder)
    (model_folder / "transformer").mkdir()
    (model_folder / "transformer/config.json").write_text("{}")
    (model_folder / "transformer/diffusion_pytorch_model.bin").write_bytes(b"no safetensors")
    settings = OmniDiffusionConfig(model=REPOSITORY, transformer_file=str(tmp_path / "x.safetensors"))
    access = HubAccess.of(settings)
    hub = serve()
    path = resolve_model_path(REPOSITORY, "auto", access)
    assert names_in(path) == NEEDED | {"transformer/config.json"}
    assert "transformer/diffusion_pytorch_model.bin" not in hub.num_bytes
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert resolve_model_path(REPOSITORY, "auto", access) == path
    with pytest.raises(ConfigError, match=r"transformer/ has no \.safetensors file"):
        resolve_model_path(REPOSITORY)


@pytest.mark.parametrize(
    ("removed", "variant", "message"),
    [
        ("vae/*.safetensors", None, "vae/ has no .safetensors file, but diffusion_pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", None, "vae/ has weight files of the variants fp16 alone"),
        ("*/*fp16*", "fp16", "--variant takes one that the model has (none), got 'fp16'"),
        ("text_encoder/model-00002*", None, "text_encoder/ lacks model-00002-of-00002.safetensors, which model.safe"),
    ],
)
def test_weights_that_the_repository_lacks_are_told_before_any_is_fetched(
    removed: str, variant: str | None, message: str, serve: Serve, model_folder: Path
) -> None:
    for file in model_folder.glob(removed):
        file.unlink()
    hub = serve()
    with pytest.raises(ConfigError) as caught:
        resolve_model_path(REPOSITORY, "auto", HubAccess(variant=variant))
    assert str(caught.value).startswith(message)
    assert [name for name in hub.num_bytes if name.endswith(".safetensors")] == []


def test_an_index_that_names_files_elsewhere_fetches_no_weights(serve: Serve, model_folder: Path) -> None:
    index = model_folder / "text_encoder/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}')
    hub = serve()
    with pytest.raises(ConfigError, match=r"^text_encoder/model\.safetensors\.index\.json names '\.\./vae/"):
        resolve_model_path(REPOSITORY)
    assert set(hub.num_bytes) == CONFIGS | {"text_encoder/model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("breakage", "settings", "message"),
    [
        (values("model_index.json", _class_name="QwenImageLayeredPipeline"), {}, "it makes several layers a picture"),
        (values("model_index.json", _class_name="StableVideoDiffusionPipeline"), {}, "its call has no prompt"),
        (values("model_index.json", _class_name="NoSuchPipeline"), {}, "NoSuchPipeline"),
        (values("transformer/config.json", guidance_embeds=True), {}, "guidance_embeds=True: not available yet"),
        (values("transformer/config.json", num_layers=None), {}, "num_layers"),
        (None, {"tensor_parallel_size": 7}, "--tensor-parallel-size takes"),
        (None, {"default_sampling_params": {"height": 1}}, "--default-sampling-params"),
    ],
)
def test_a_model_that_is_not_served_costs_no_weights(
    breakage: Breakage | None, settings: dict[str, Any], message: str, serve: Serve, tmp_path: Path
) -> None:
    folder = shutil.copytree(DEMO_MODEL_PATH, tmp_path / "demo")
    if breakage is not None:
        breakage(folder)
    hub = serve(folder=folder)
    with pytest.raises(ConfigError, match=message):
        AsyncOmni(model=REPOSITORY, **settings)
    assert [name for name in hub.num_bytes if "safetensors" in name] == []


def test_a_hub_that_cannot_be_reached_leaves_what_was_fetched(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    path = resolve_model_path(REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert resolve_model_path(REPOSITORY) == path


def test_an_earlier_download_without_weights_does_not_hide_that_the_hub_is_away(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    path = resolve_model_path(REPOSITORY, "dummy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model_path(REPOSITORY, "dummy") == path
    with pytest.raises(ConfigError, match=r"offline mode .*; the earlier download in .*: vae/ has no \.safetensors"):
        resolve_model_path(REPOSITORY)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer/*", r"names tokenizer, but the model has no folder tokenizer/"),
        ("tokenizer/tokenizer.json", r"tokenizer\.json"),
        ("vae/config.json", r"cannot read vae/config\.json"),
        ("scheduler/*", r"scheduler"),
        ("transformer/*.safetensors", r"transformer/ has no \.safetensors"),
    ],
)
def test_an_earlier_download_that_lacks_a_file_does_not_hide_that_the_hub_is_away(
    lost: str, message: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(folder=DEMO_MODEL_PATH)
    path = AsyncOmni(model=REPOSITORY).info.path
    for file in path.glob(lost):
        file.unlink()
    if not any((path / lost).parent.iterdir()):
        (path / lost).parent.rmdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=rf"offline mode .*; the earlier download in .*: .*{message}") as caught:
        AsyncOmni(model=REPOSITORY)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("offline mode") == 1


def test_a_wrong_setting_is_not_blamed_on_the_hub(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(folder=DEMO_MODEL_PATH)
    AsyncOmni(model=REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^--default-sampling-params"):
        AsyncOmni(model=REPOSITORY, default_sampling_params={"height": 1})


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
    with pytest.raises(ConfigError, match=f"^model '{REPOSITORY}' .* offline mode is enabled"):
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


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_an_embedded_model_is_never_looked_up_at_the_hub(
    name: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve()
    monkeypatch.setitem(EMBEDDED_MODELS, name, tmp_path / "missing")
    with pytest.raises(ConfigError, match=f"^model '{name}' is not in the diffusers layout"):
        resolve_model_path(name)
    assert not hub.num_bytes


def test_a_hub_model_in_another_layout_is_told(serve: Serve, model_folder: Path) -> None:
    (model_folder / "model_index.json").unlink()
    serve()
    with pytest.raises(ConfigError, match=f"^model '{REPOSITORY}' is not in the diffusers layout"):
        resolve_model_path(REPOSITORY)


def test_settings_of_the_engine_reach_the_hub(serve: Serve, tmp_path: Path) -> None:
    serve(TOKEN, DEMO_MODEL_PATH)
    mine = tmp_path / "mine"
    path = AsyncOmni(REPOSITORY, revision="v1", download_dir=mine, hf_token=TOKEN, load_format="dummy").info.path
    assert path.name == COMMITS["v1"]
    assert path.is_relative_to(mine)


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_a_download_are_hidden_on_request(
    shown: bool, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve()
    resolve_model_path(REPOSITORY, "auto", HubAccess(progress_bar=shown))
    assert ("%|" in capsys.readouterr().err) is shown


def test_a_model_of_the_hub_passes_all_checks(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve(folder=DEMO_MODEL_PATH)
    path = AsyncOmni(model=REPOSITORY).info.path
    assert (path / "model_index.json").is_symlink()  # into the cache's blobs, outside of the model's folder
    assert sum(hub.num_bytes.values()) == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    AsyncOmni(model=str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert AsyncOmni(model=REPOSITORY).info.path == path


@pytest.mark.parametrize("as_name", [str, lambda path: "demo", lambda path: "demo-video"])
def test_a_folder_has_no_revision(as_name: Callable[[Path], str], model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--revision v1 is for hub models; '.*' is a folder, which has none"):
        resolve_model_path(as_name(model_folder), "auto", HubAccess("v1"))
