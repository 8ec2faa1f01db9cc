"""From a model's name to its folder: what is no name of the hub is a path, and nobody is asked for it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.errors import ConfigError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the hub was asked for; it cannot be reached."""
    names: list[str] = []

    def answer(hub: huggingface_hub.HfApi, name: str, **_: object) -> None:
        names.append(name)
        raise ConnectionError("nobody is there\nand more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    return names


@pytest.mark.parametrize(
    "model", ["./nowhere", "../no/where", ".", "/abs/nowhere", "~/nowhere", "no/such/folder", "a/b/"]
)
def test_a_path_without_a_folder_says_so(
    model: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_model_info(model)
    ends = "is not in the diffusers layout: it has no model_index.json" if model == "." else "there is no such folder"
    assert str(caught.value).endswith(ends)
    assert repr(model) in str(caught.value)
    assert asked == []


@pytest.mark.parametrize("model", ["nowhere", "nobody/nowhere"])
def test_a_name_is_asked_for_at_the_hub(model: str, asked: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=f"^model '{model}' is neither a folder, .* hub model: ConnectionError: nobody is there$"
    ):
        load_model_info(model)
    assert asked == [model]
