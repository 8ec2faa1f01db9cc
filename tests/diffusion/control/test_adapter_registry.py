"""Adapters that requests may name: those of the config, loaded ones, and files of folders."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from vllm_omni.diffusion.control import adapter_registry
from vllm_omni.diffusion.control.adapter_registry import AdapterFolder, AdapterRegistry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import WEIGHTS
from vllm_omni.inputs.adapters import ServedAdapter


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "wet", first / "empty", second):
        folder.mkdir(parents=True)
    for file in (first / "ink", first / "sty\nle", first / ("x" * 129), second / "ink", second / "oil"):
        file.with_name(f"{file.name}.safetensors").touch()
    (first / "wet" / WEIGHTS).touch()
    (first / "out.safetensors").symlink_to(second / "oil.safetensors")
    (first / "near.safetensors").symlink_to("ink.safetensors")
    return str(first), str(second)


def registry(*folders: str, **modules: str) -> AdapterRegistry:
    return AdapterRegistry(OmniDiffusionConfig("demo", lora_modules=modules, lora_dirs=folders).with_adapter_files())


def test_files_of_folders_are_listed_by_name(folders: tuple[str, str]) -> None:
    first, second = folders
    served = registry(first, second, pen=f"{first}/ink.safetensors")
    files = {adapter.name: (adapter.file, adapter.source) for adapter in served}
    assert files == {
        "pen": (f"{first}/ink.safetensors", "start"),
        "ink": (f"{first}/ink.safetensors", "folder"),
        "near": (f"{first}/near.safetensors", "folder"),
        "oil": (f"{second}/oil.safetensors", "folder"),
        "wet": (f"{first}/wet/{WEIGHTS}", "folder"),
    }
    assert served.names() == tuple(files)
    assert "out" not in served
    with patch.object(AdapterFolder, "files", autospec=True, side_effect=AdapterFolder.files) as looks:
        list(served)
    assert looks.call_count == len(folders), "a listing looks once into each folder, however many files it has"


def test_a_new_file_is_listed_at_once(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_registry, "RELIST_SECONDS", -1.0)  # times of files may be as coarse as 4 ms
    served = registry(*folders)
    for name, place in (("tar", "tar.safetensors"), ("empty", f"empty/{WEIGHTS}")):
        assert name not in served
        (file := Path(folders[0], place)).touch()
        assert served.get(name) == ServedAdapter(name, str(file), {}, "folder")
        file.unlink()
        assert name not in served


def test_a_loaded_adapter_hides_the_file_of_a_folder(folders: tuple[str, str]) -> None:
    served = registry(*folders)
    served.check_free("ink")
    served.put(ServedAdapter("ink", "/elsewhere/ink.safetensors", {}, "loaded"))
    with pytest.raises(InvalidRequestError, match="'ink' has already been loaded") as refused:
        served.check_free("ink")
    assert folders[0] not in str(refused.value)
    assert (served.names()[0], served.names().count("ink")) == ("ink", 1)
    served.remove("ink")
    assert served.require("ink").source == "folder"
    for wrong in ("", "a\nb", "x" * 129):
        with pytest.raises(InvalidRequestError, match="an adapter takes a name"):
            served.check_free(wrong)
        with pytest.raises(InvalidRequestError, match="an adapter takes a name"):
            served.check_free(wrong, replace=True)


def test_defaults_belong_to_the_file_that_they_were_given_for(folders: tuple[str, str]) -> None:
    recipe = {"num_inference_steps": 4}
    config = OmniDiffusionConfig(
        "demo", lora_modules={"ink": f"{folders[1]}/ink.safetensors"}, lora_dirs=folders, lora_defaults={"ink": recipe}
    )
    served = AdapterRegistry(config.with_adapter_files())
    assert served.remove("ink").defaults == recipe
    assert served.require("ink") == ServedAdapter("ink", f"{folders[0]}/ink.safetensors", {}, "folder")
