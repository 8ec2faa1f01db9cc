"""LoRA adapters in the models of a pipeline, by diffusers and peft: any number are loaded, one at most is active."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_omni.diffusion.models.diffusers_fallback.progress_bars import without_progress_bars
from vllm_omni.diffusion.request import LoRA
from vllm_omni.errors import InvalidRequestError

MAX_UNSERVED = 8
"""Adapters kept beside the served ones: more than requests may be under way, so that one of them is always idle."""
MARKS = ("lora", "lokr", "alpha")
"""One of them is in the name of each weight that belongs to an adapter. Others would replace the model's own."""
DOWN = ".lora_A.weight"
"""The weight [rank, inputs of the layer] of one layer's adapter."""


class Adapters:
    """Loads adapters and switches between them; the model's own weights stay as they are."""

    def __init__(self, pipeline: Any, served: Iterable[str]) -> None:
        """`served`: files that are loaded now and kept. Raises InvalidRequestError for one that does not fit."""
        self._pipeline = pipeline
        self._names: dict[str, str] = {}
        """Of loaded files, as diffusers knows them; the one used last comes last."""
        self._num_loaded = 0
        self._active: tuple[str, float] | None = None
        self._served = frozenset(served)
        for file in sorted(self._served):
            self._load(file)

    def use(self, lora: LoRA | None, under_way: Collection[str] = ()) -> None:
        """Let what runs next run with this adapter alone, or with none; loads it first where need be.

        under_way: files whose requests will go on. Raises InvalidRequestError for an adapter that does not fit.
        """
        wanted = None if lora is None else (self._name_of(lora.path, under_way), lora.scale)
        if wanted == self._active:
            return
        if wanted is None:
            self._pipeline.disable_lora()
        else:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(*wanted)
        self._active = wanted

    def _name_of(self, file: str, under_way: Collection[str]) -> str:
        if file not in self._names:
            self._make_room(under_way)
            self._load(file)
        name = self._names[file] = self._names.pop(file)
        return name

    def _make_room(self, under_way: Collection[str]) -> None:
        idle = [file for file in self._names if file not in self._served and file not in under_way]
        if len(self._names) - len(self._served) >= MAX_UNSERVED:
            self._delete(self._names.pop(idle[0]))

    def _load(self, file: str) -> None:
        name = f"adapter_{self._num_loaded}"
        self._num_loaded += 1
        self._check(file)
        path = Path(file)
        try:
            with without_progress_bars(), _without_expected_warnings():
                self._pipeline.load_lora_weights(
                    str(path.parent),
                    weight_name=path.name,
                    adapter_name=name,
                    use_safetensors=True,
                    local_files_only=True,
                )
        except Exception as error:  # a file may hold anything, and each part of the libraries says so in its own way
            self._delete(name)
            # diffusers' own cleaning up may fail and hide the reason.
            reason = error.__context__ if isinstance(error, KeyError) and error.__context__ else error
            raise _misfit(file, str(reason)) from error
        if name not in chain.from_iterable(self._pipeline.get_list_adapters().values()):
            raise _misfit(file, "none of its weights has a layer here")
        self._names[file] = name
        self._deactivate()

    def _check(self, file: str) -> None:
        """Refuse what diffusers would write into the model itself, or widen its layers for."""
        try:
            with safe_open(file, framework="pt") as weights:
                shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118  # no dict
        except (OSError, SafetensorError) as error:
            raise _misfit(file, str(error)) from error
        layers = {
            f"{component}.{layer}": module
            for component, model in self._pipeline.components.items()
            if hasattr(model, "named_modules")
            for layer, module in model.named_modules()
        }
        for key, shape in shapes.items():
            if not any(mark in key for mark in MARKS):
                raise _misfit(file, f"{key} is no part of an adapter")
            inputs = getattr(layers.get(key.removesuffix(DOWN)), "in_features", None)
            if key.endswith(DOWN) and inputs is not None and shape[1:2] != [inputs]:
                raise _misfit(file, f"{key} has the shape {shape}, its layer has {inputs} inputs")

    def _delete(self, name: str) -> None:
        with _without_expected_warnings():
            self._pipeline.delete_adapters(name)
        self._deactivate()

    def _deactivate(self) -> None:
        """What diffusers has active now is another adapter in each layer."""
        self._pipeline.disable_lora()
        self._active = None


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Of what we mean to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute in the model")
        warnings.filterwarnings("ignore", message=".*was active which is now deleted")
        yield


def _misfit(file: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the LoRA adapter {file} does not fit this model: {' '.join(reason.split())}", param="lora_request"
    )
