"""Weight files that are chosen of a component, compared with diffusers' own choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from safetensors.numpy import save_file

from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS, TRANSFORMERS_STEMS, Component
from vllm_omni.diffusion.catalog.registry import family_of
from vllm_omni.diffusion.catalog.weight_files import (
    choose_names,
    component_variant,
    has_weights,
    read_header,
    safetensors_files,
    stored_weights,
    variants_in,
)
from vllm_omni.errors import ConfigError

PLAIN, HALF = "model.safetensors", "model.fp16.safetensors"
FOLDERS: dict[str, list[str]] = {
    "one file": [PLAIN],
    "both": [PLAIN, HALF],
    "diffusers' name": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
    "shards": [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["model.safetensors.index.json"],
    "shards of both": [
        *(f"model{variant}-0000{n}-of-00002.safetensors" for n in (1, 2) for variant in ("", ".fp16")),
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
    ],
}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
def test_the_choice_is_that_of_diffusers(names: list[str], variant: str | None) -> None:
    has_variant = any("fp16" in name for name in names)
    expected, _ = variant_compatible_siblings([f"x/{name}" for name in names], variant if has_variant else None)
    chosen = choose_names([*names, "config.json", "model.bin"], variant)
    assert chosen is not None
    index = () if chosen.index is None else (chosen.index,)
    assert {f"x/{name}" for name in (*chosen.files, *index)} == set(expected)
    assert chosen.variant == (variant if has_variant else None)


def test_each_variant_has_its_own_file(tmp_path: Path) -> None:
    for name in (PLAIN, HALF):
        (tmp_path / name).touch()
    assert [file.name for file in safetensors_files(tmp_path)] == [PLAIN]
    assert [file.name for file in safetensors_files(tmp_path, "fp16")] == [HALF]
    assert component_variant(tmp_path, "bf16") is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([HALF], ["variants fp16 alone", "--variant"]),
        (["model-00001-of-00002.bf16.safetensors"], ["variants bf16 alone", "--variant"]),
        (["model.bin"], ["no .safetensors file, but model.bin"]),
        ([], ["no .safetensors file named"]),
    ],
)
def test_a_folder_without_a_choice_is_told(names: list[str], words: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        safetensors_files(tmp_path)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "it must hold a JSON object, got []"),
        ("{", "no valid JSON"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("{}", "weight_map must be a JSON object of names of files, got None"),
        ('{"weight_map": {"a": 1}}', "names of files, got {'a': 1}"),
        ('{"weight_map": {}}', "weight_map is empty"),
        (
            '{"weight_map": {"a": "../../outside.safetensors"}}',
            "names '../../outside.safetensors', which is not a file",
        ),
        ('{"weight_map": {"a": "/outside.safetensors"}}', "names '/outside.safetensors', which is not a file"),
        ('{"weight_map": {"a": "model.bin"}}', "names 'model.bin', which is no safetensors file"),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "lacks gone.safetensors, which model.safetensors.index.json names",
        ),
    ],
)
def test_a_broken_index_is_one_line_with_the_file(index: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError) as caught:
        safetensors_files(tmp_path)
    message = str(caught.value)
    assert words in message
    assert "model.safetensors.index.json" in message
    assert "\n" not in message


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("one.safetensors", "two.safetensors", "three.safetensors"):
        (tmp_path / name).touch()
    assert [file.name for file in safetensors_files(tmp_path)] == ["one.safetensors", "two.safetensors"]


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
START = len(HEADER).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (START + HEADER + b"1234", f"is truncated: it has {12 + len(HEADER)} bytes and needs {16 + len(HEADER)}"),
        (START + HEADER[:4], f"is truncated: it has 12 bytes, its header alone needs {8 + len(HEADER)}"),
        (b"", "is no safetensors file: it has 0 bytes"),
        (b"PK" * 8, "is no safetensors file: it has 16 bytes"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ((2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYP' and has no header"),
        (START + HEADER.replace(b"[2]", b"[3]") + b"12345678", "is no safetensors file: "),
        (START + HEADER.replace(b"F32", b"F99") + b"12345678", "is no safetensors file: "),
        (START + HEADER + b"12345678surplus", "is no safetensors file: "),
    ],
)
def test_a_broken_file_is_one_line_with_the_file(data: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "vae" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(START + HEADER + b"12345678")
    assert read_header(tmp_path, "vae/model.safetensors") == {"a": ("vae/model.safetensors", "F32", (2,))}
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_header(tmp_path, "vae/model.safetensors")
    assert words in str(caught.value)
    assert "vae/model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_file_is_opened_once_and_the_last_shard_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index does not decide which weights there are: diffusers and transformers read the files too."""
    folder = tmp_path / "x"
    folder.mkdir()
    weight_map = {"a": "two.safetensors", "b": "one.safetensors", "gone": "one.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"a": np.zeros(1, np.float32), "both": np.zeros(1, np.float16)}, folder / "one.safetensors")
    save_file({"b": np.zeros((2, 3), np.float32), "both": np.zeros(2, np.float32)}, folder / "two.safetensors")
    opened: list[str] = []
    safe_open, open_path = safetensors.safe_open, Path.open

    def note_library(path: Path, *arguments: Any, **keywords: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, *arguments, **keywords)

    def note_path(path: Path, *arguments: Any, **keywords: Any) -> Any:
        opened.append(path.name)
        return open_path(path, *arguments, **keywords)

    monkeypatch.setattr(safetensors, "safe_open", note_library)
    monkeypatch.setattr(Path, "open", note_path)
    assert stored_weights(folder) == {
        "a": ("x/one.safetensors", "F32", (1,)),
        "b": ("x/two.safetensors", "F32", (2, 3)),
        "both": ("x/two.safetensors", "F32", (2,)),
    }
    assert opened == ["model.safetensors.index.json", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("stem", [DIFFUSERS_STEMS[0], TRANSFORMERS_STEMS[0]])
def test_each_library_has_its_own_names(stem: str) -> None:
    """Files of the other library's name are neither chosen nor named as variants."""
    both = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    chosen = choose_names(both, None, (stem,))
    assert chosen is not None
    assert chosen.files == (f"{stem}.safetensors",)
    assert choose_names(both, None) is None
    halves = ["diffusion_pytorch_model.fp16.safetensors", "model.bf16.safetensors"]
    assert variants_in(halves, (stem,)) == (["fp16"] if stem == DIFFUSERS_STEMS[0] else ["bf16"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json"], True),
        (["model.safetensors"], True),
        (["pytorch_model.bin", "some_config.json"], True),
        (["generation_config.json"], True),
        ([], True),
        (["some_config.json"], False),
    ],
)
def test_an_unknown_class_is_a_model_by_its_files(names: list[str], expected: bool) -> None:
    assert has_weights(Component("diffusers", "SomethingNew"), names) is expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it must hold a JSON object, got []"),
        ("{", "no valid JSON"),
        ('{"steps": 3}', "unknown keys ['steps'], accepted are "),
    ],
)
def test_broken_defaults_of_a_model_are_told(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_default_sampling_params(tmp_path)
    assert words in str(caught.value)
    assert DEFAULTS_FILE in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_a_broken_model_index_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model_index\.json: "):
        family_of(tmp_path)
