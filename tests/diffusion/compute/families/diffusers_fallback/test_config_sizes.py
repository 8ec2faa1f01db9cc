"""Odd values in the configs that a whole pipeline is described by: each is accepted or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.tiny_diffusers import BUILDERS
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import (
    INDEX_NUMBERS,
    LISTS,
    NUMBERS,
    NUMBERS_OR_LISTS,
    SWITCHES,
)
from vllm_omni.diffusion.compute.families.diffusers_fallback.info import describe
from vllm_omni.diffusion.control.default_checks import check_defaults
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

ODD: list[Any] = ["60", [], {}, None, -5, 0, 10**9, 1.5, True, float("nan"), [0, 0], [1], [10**9], [None]]
SIZE_KEYS = (*NUMBERS, *LISTS, *NUMBERS_OR_LISTS, *SWITCHES)


FURTHER_KEYS = ("HunyuanVideo15Pipeline", "LTXImageToVideoPipeline")
"""Pipelines whose configs are also given the keys that only others have."""
SOME = (*FURTHER_KEYS, "HunyuanDiTPipeline", "SanaPipeline", "StableDiffusionXLPipeline")
"""Pipelines of the default run, which together have every kind of size; the others are thorough."""


def odd_keys(folder: Path, *, has_further: bool) -> Iterator[tuple[Path, str]]:
    """The files that `describe` reads, each with a key of it; has_further: also with keys that it lacks."""
    for component in ("vae", "transformer", "unet"):
        if (file := folder / component / "config.json").exists():
            present = json.loads(file.read_text())
            yield from ((file, key) for key in SIZE_KEYS if has_further or key in present)
    yield from ((folder / "model_index.json", key) for key in (*INDEX_NUMBERS, "_class_name", "scheduler", "tokenizer"))
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        yield from ((file, key) for key in ("model_max_length", "tokenizer_class", "added_tokens_decoder"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.thorough) for name in BUILDERS]
)
def test_odd_values_are_accepted_or_refused(name: str, model_of: ModelOf, tmp_path: Path) -> None:
    folder = shutil.copytree(
        model_of(name), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "default_sampling*")
    )
    num_refused = 0
    for file, key in odd_keys(folder, has_further=name in FURTHER_KEYS):
        text = file.read_text()
        for value in ODD:
            file.write_text(json.dumps(json.loads(text) | {key: value}))
            try:
                check_defaults(OmniDiffusionConfig(str(folder)), describe(folder))
            except ConfigError:
                num_refused += 1
            except Exception as error:
                raise AssertionError(f"{file}: {key} {value!r}") from error
        file.write_text(text)
    assert num_refused
