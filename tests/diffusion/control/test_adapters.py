"""Adapters of requests: look-up, scales and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from tests.diffusion.control.builders import INFO, READY, WHOLE
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_registry import AdapterFolder, AdapterRegistry
from vllm_omni.diffusion.control.default_checks import check_defaults
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt

TAKES_LORA = replace(WHOLE, pipeline=replace(WHOLE.pipeline, takes_lora=True))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the name of an adapter; nobody reads it."""
    path = tmp_path / "style.safetensors"
    path.touch()
    return path


def resolve(info: ModelInfo, modules: dict[str, str], **params: Any) -> DiffusionRequest:
    builder = RequestBuilder(OmniDiffusionConfig("demo", lora_modules=modules), info, READY)
    (request,) = builder.build(OmniPrompt("x"), OmniDiffusionSamplingParams(**params), "r")
    return request.request


@pytest.mark.parametrize(
    ("asked", "lora_scale", "scale"),
    [
        (LoRARequest("style"), None, 1.0),
        (LoRARequest("style", scale=np.float32(0.5)), None, 0.5),  # type: ignore[arg-type]
        (LoRARequest("style", scale=2.0), -0.5, -0.5),
        (LoRARequest("other", "FILE"), 0.5, 0.5),
    ],
)
def test_an_adapter_is_found_by_its_name_or_its_path(
    file: Path, asked: LoRARequest, lora_scale: float | None, scale: float
) -> None:
    if asked.path is not None:
        asked = replace(asked, path=str(file.parent))
    request = resolve(TAKES_LORA, {"style": str(file)}, lora_request=asked, lora_scale=lora_scale)
    assert request.loras == (LoRA(asked.name, str(file), scale),)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=DiffusionRequest)
    assert sent.loras == request.loras


def test_an_adapter_may_bring_the_shift_of_its_schedule(file: Path) -> None:
    def shift_of(recipe: dict[str, Any], **params: Any) -> float | None:
        config = OmniDiffusionConfig(
            "demo",
            lora_modules={"fast": str(file)},
            lora_defaults={"fast": recipe},
            default_sampling_params={"shift": 5.0},
        )
        (request,) = RequestBuilder(config, INFO, READY).build(
            OmniPrompt("x"), OmniDiffusionSamplingParams(**params), "r"
        )
        return request.request.flow_shift

    fast = LoRARequest("fast")
    for name in ("shift", "flow_shift"):
        assert shift_of({name: 3}, lora_request=fast) == 3.0
        assert shift_of({name: 3}, lora_request=fast, flow_shift=2.0) == 2.0
        assert shift_of({name: 3}) == 5.0
    with pytest.raises(ConfigError, match=r"adapter 'fast': shift and flow_shift differ: got 3 and 4$"):
        shift_of({"shift": 3, "flow_shift": 4})


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"lora_request": LoRARequest("nobody")}, "lora_request", "no LoRA adapter 'nobody'; served: style"),
        ({"lora_request": LoRARequest("a", "/nowhere")}, "lora_request", "takes a safetensors file that exists"),
        ({"lora_request": LoRARequest("style", scale=1e9)}, "lora_request", "from -100 to 100"),
        ({"lora_request": LoRARequest("style"), "lora_scale": float("inf")}, "lora_scale", "from -100 to 100"),
        ({"lora_request": LoRARequest(3)}, "lora_request", "whose name is a string, got"),  # type: ignore[arg-type]
        ({"lora_request": "style"}, "lora_request", "takes a LoRARequest"),
        ({"lora_scale": 0.5}, "lora_scale", "needs a lora_request"),
    ],
)
def test_a_wrong_request_is_told(file: Path, params: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        resolve(TAKES_LORA, {"style": str(file)}, **params)
    assert caught.value.param == param


def test_a_model_without_adapters_says_so(file: Path) -> None:
    with pytest.raises(InvalidRequestError, match="a SomePipeline takes no LoRA adapters"):
        resolve(WHOLE, {}, lora_request=LoRARequest("style", str(file)))


@pytest.mark.parametrize("info", [INFO, TAKES_LORA])
def test_a_request_may_name_several(file: Path, tmp_path: Path, info: ModelInfo) -> None:
    other = tmp_path / "other.safetensors"
    other.touch()
    asked = [LoRARequest("style", scale=0.5), LoRARequest("other", other)]
    for scales, wanted in ((None, (0.5, 1.0)), ([0.25, -1], (0.25, -1.0)), (np.array([2.0, 3.0]), (2.0, 3.0))):
        request = resolve(info, {"style": str(file)}, lora_request=asked, lora_scale=scales)
        assert request.loras == (LoRA("style", str(file), wanted[0]), LoRA("other", str(other), wanted[1]))
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=DiffusionRequest)
        assert sent.loras == request.loras
    for params, param, words in (
        ({"lora_scale": 0.5}, "lora_scale", "a number for each of the 2 adapters, got 0.5"),
        ({"lora_scale": [1, 2, 3]}, "lora_scale", "a number for each of the 2 adapters, got"),
        (
            {"lora_request": [*asked, LoRARequest("again", file)]},
            "lora_request",
            "each adapter once, got two names of one file, 'style' and 'again'",
        ),
        ({"lora_request": [asked[0], *asked]}, "lora_request", "each adapter once, got 'style' again"),
        ({"lora_request": [*asked, "ink"]}, "lora_request", "takes a list of LoRARequest"),
        ({"lora_request": asked * 5}, "lora_request", "at most 8 adapters, got 10"),
    ):
        with pytest.raises(InvalidRequestError, match=words) as caught:
            resolve(info, {"style": str(file)}, **{"lora_request": asked, **params})
        assert caught.value.param == param


def test_a_served_name_keeps_its_file(tmp_path: Path) -> None:
    """A file that is moved, or a link that leads elsewhere, changes no request."""
    folder, other, link = tmp_path / "ink", tmp_path / "other.safetensors", tmp_path / "link.safetensors"
    folder.mkdir()
    (file := folder / "style.safetensors").touch()
    other.touch()
    link.symlink_to(file)
    config = OmniDiffusionConfig("demo", lora_modules={"ink": str(folder), "link": str(link)}).with_adapter_files()
    builder = RequestBuilder(config, INFO, READY)

    def file_of(name: str) -> str:
        (request,) = builder.build(OmniPrompt("x"), OmniDiffusionSamplingParams(lora_request=LoRARequest(name)), "r")
        return request.request.loras[0].path

    for change in (lambda: None, lambda: file.rename(tmp_path / "moved"), link.unlink, lambda: link.symlink_to(other)):
        change()
        assert (file_of("ink"), file_of("link")) == (str(file), str(link))


def test_links_to_one_file_are_one_adapter(file: Path, tmp_path: Path) -> None:
    hard, soft = tmp_path / "hard.safetensors", tmp_path / "soft.safetensors"
    hard.hardlink_to(file)
    soft.symlink_to(file)
    for link in (hard, soft):
        with pytest.raises(InvalidRequestError, match="got two names of one file, 'style' and 'again'"):
            resolve(INFO, {"style": str(file)}, lora_request=[LoRARequest("style"), LoRARequest("again", link)])


def test_settings_are_checked_at_start(file: Path) -> None:
    config = OmniDiffusionConfig("demo", lora_modules={"style": str(file)})
    TAKES_LORA.check_settings(config)
    INFO.check_settings(config)
    with pytest.raises(ConfigError, match=r"^--lora-modules style: a SomePipeline takes no adapters"):
        WHOLE.check_settings(config)
    file.unlink()
    with pytest.raises(ConfigError, match=r"^--lora-modules style takes a safetensors file that exists.*, got '/"):
        TAKES_LORA.check_settings(config)
    with pytest.raises(ConfigError, match=r"^--lora-modules takes names and paths"):
        OmniDiffusionConfig("demo", lora_modules={"style": 3})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"^--default-sampling-params: lora_scale 0.5 needs"):
        check_defaults(OmniDiffusionConfig("demo", default_sampling_params={"lora_scale": 0.5}), TAKES_LORA)


def test_a_server_may_have_an_adapter_for_requests_that_name_none(file: Path) -> None:
    def served(name: str) -> OmniDiffusionConfig:
        defaults = {"lora_request": {"name": name, "scale": 0.5}}
        return OmniDiffusionConfig(
            "demo", lora_modules={"style": str(file), "ink": str(file)}, default_sampling_params=defaults
        )

    check_defaults(served("style"), TAKES_LORA)
    builder = RequestBuilder(served("style"), TAKES_LORA, READY)
    for asked, lora in ((None, LoRA("style", str(file), 0.5)), (LoRARequest("ink"), LoRA("ink", str(file), 1.0))):
        (request,) = builder.build(OmniPrompt("x"), OmniDiffusionSamplingParams(lora_request=asked), "r")
        assert request.request.loras == (lora,)
    with pytest.raises(ConfigError, match=r"^--default-sampling-params: there is no LoRA adapter 'x'; served: style"):
        check_defaults(served("x"), TAKES_LORA)
    several = OmniDiffusionConfig(
        "demo",
        lora_modules={"style": str(file)},
        default_sampling_params={"lora_request": [{"name": "style", "scale": 0.5}], "lora_scale": [2.0]},
    )
    (request,) = RequestBuilder(several, INFO, READY).build(OmniPrompt("x"), OmniDiffusionSamplingParams(), "r")
    assert request.request.loras == (LoRA("style", str(file), 2.0),)


def test_a_folder_lists_names_that_can_be_written_and_is_looked_at_once(tmp_path: Path) -> None:
    for name in ("ink", "sty\nle", " ink", "x" * 129):
        (tmp_path / f"{name}.safetensors").touch()
    registry = AdapterRegistry(OmniDiffusionConfig("demo", lora_dirs=(str(tmp_path),)))
    with patch.object(AdapterFolder, "files", autospec=True, side_effect=AdapterFolder.files) as looks:
        assert registry.names() == ("ink",)
    assert looks.call_count == 1
    for wrong in ("", "sty\nle", "x" * 129):
        with pytest.raises(InvalidRequestError, match="an adapter takes a name"):
            registry.check_free(wrong)
