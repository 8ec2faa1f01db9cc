"""Adapters that requests may name: those of the config, loaded ones, and files of folders."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import AsyncMock, Mock, patch

import pytest

from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control import adapter_loading, adapter_registry
from vllm_omni.diffusion.control.adapter_loading import AdapterLoading
from vllm_omni.diffusion.control.adapter_registry import AdapterFolder, AdapterRegistry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import WEIGHTS, file_stamp
from vllm_omni.inputs.adapters import ServedAdapter
from vllm_omni.inputs.data import LoRARequest


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


async def test_loads_add_names_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loading, "MAX_LOADED", 2)
    for name in "abc":
        (tmp_path / f"{name}.safetensors").touch()
    served = registry(a=str(tmp_path / "a.safetensors"))
    engine = AsyncMock(forget_adapters=Mock(), resident_adapters=[])
    loading = AdapterLoading(served, load_model_info("demo"), engine)

    async def load(name: str, replace: bool = False) -> None:
        await loading.load(LoRARequest(name, tmp_path / f"{name[0]}.safetensors"), {}, replace)

    await load("b1")
    await load("b2")
    with pytest.raises(InvalidRequestError, match="2 loaded LoRA adapters are served, no more are taken"):
        await load("c1")
    await load("b2", replace=True)
    await loading.unload("a")  # given at start: it did not count
    with pytest.raises(InvalidRequestError, match="no more are taken"):
        await load("c1")
    await loading.unload("b1")
    waiting = asyncio.Event()

    async def wait(key: AdapterKey) -> None:
        await waiting.wait()

    engine.load_adapter.side_effect = wait
    under_way = asyncio.create_task(load("c1"))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequestError, match="no more are taken"):
        await load("c2")
    waiting.set()
    await under_way
    assert served.names() == ("b2", "c1")


def test_the_state_of_a_file_is_forgotten_with_the_last_of_its_names(tmp_path: Path) -> None:
    served = registry()
    (file := tmp_path / "a.safetensors").touch()
    for name in "ab":
        served.put(ServedAdapter(name, str(file), {}, "loaded"), file_stamp(str(file)))
    stamp = file_stamp(str(file))
    file.unlink()
    served.remove("a")
    assert served.stamp(str(file)) == stamp
    served.remove("b")
    assert served.stamp(str(file)) == ""
