"""Components of whole pipelines: which are models and which weight files each reads, for all classes there are."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import pipelines
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from testbed.tiny_diffusers import BUILDERS
from tests.broken_folders import Breakage, both, linked_outside, moved, outside_of, sharded, text, values, weights
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, read_object
from vllm_omni.diffusion.catalog.hub import DEFAULT_ACCESS, needed_files
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS, TRANSFORMERS_STEMS, Component, read_components
from vllm_omni.diffusion.catalog.weight_files import has_weights
from vllm_omni.diffusion.compute.families.diffusers_fallback.components import component_classes
from vllm_omni.diffusion.compute.families.diffusers_fallback.loading import load_pipeline
from vllm_omni.errors import ConfigError
from vllm_omni.omni import AsyncOmni

PIPELINE = "StableDiffusionPipeline"
INDEX = "model.safetensors.index.json"
STEM = DIFFUSERS_STEMS[0]


def member(module: Any, name: str) -> Any:
    """None also for a name that the module lists but cannot import."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None


def classes_of_diffusers() -> dict[Component, Any]:
    """All classes that a model_index.json may name of diffusers and of the modules of its pipelines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules of old classes warn as they are imported
        modules = {name: member(pipelines, name) for name in dir(pipelines)}
        places = {"diffusers": diffusers} | {n: m for n, m in modules.items() if inspect.ismodule(m)}
        members = {
            Component(library, name): member(module, name) for library, module in places.items() for name in dir(module)
        }
    loadable = (diffusers.ConfigMixin, transformers.PreTrainedModel)
    return {
        component: cls
        for component, cls in members.items()
        if inspect.isclass(cls)
        and issubclass(cls, loadable)
        and not issubclass(cls, (diffusers.DiffusionPipeline, diffusers.AutoModel))
        and not any(word in component.class_name for word in ("Modular", "Blocks", "AutoPipeline", "ConfigMixin"))
    }


def test_models_among_all_classes_are_told_by_name_and_files() -> None:
    found = classes_of_diffusers()
    assert len(found) > 200
    for component, cls in found.items():
        is_model = issubclass(cls, nn.Module)
        assert has_weights(component, [getattr(cls, "config_name", None) or "config.json"]) == is_model, component
        if is_model:
            read = TRANSFORMERS_STEMS if issubclass(cls, transformers.PreTrainedModel) else DIFFUSERS_STEMS
            assert set(read) <= set(component.stems), component
            assert component.library != "diffusers" or component.stems == read


def test_models_among_the_classes_of_transformers() -> None:
    named = [name for value in MODEL_MAPPING_NAMES.values() for name in ([value] if isinstance(value, str) else value)]
    assert [name for name in named if Component("transformers", name).kind is not None] == []
    for kind, names in (("tokenizer", TOKENIZER_MAPPING_NAMES), ("processor", PROCESSOR_MAPPING_NAMES)):
        assert {Component("transformers", name).kind for name in names.values() if name} == {kind}
    further = {
        "CLIPFeatureExtractor": "processor",
        "SiglipImageProcessorFast": "processor",
        "T5TokenizerFast": "tokenizer",
    }
    assert {name: Component("transformers", name).kind for name in further} == further
    assert Component("transformers", "VibeVoiceAcousticTokenizerModel").kind is None


@pytest.mark.parametrize("name", BUILDERS)
def test_the_front_end_takes_every_pipeline_and_the_hub_gives_its_files(name: str, model_of: ModelOf) -> None:
    folder = model_of(name)
    AsyncOmni(model=str(folder))
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    for load_format, expected in (("auto", files), ("dummy", {n for n in files if not n.endswith(".safetensors")})):
        needed = needed_files(files, load_format, DEFAULT_ACCESS, lambda place: read_object(folder, place))  # type: ignore[arg-type]
        assert set(needed) == {n for n in expected if ".index" not in n or load_format == "auto"}


def test_settings_with_an_underscore_are_no_components(model_of: ModelOf, tmp_path: Path) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    classes = component_classes(folder)
    values(MODEL_INDEX, _ignore_files=["vae/old.bin", "notes.txt"])(folder)
    AsyncOmni(model=str(folder))
    assert component_classes(folder) == classes
    load_pipeline(folder, PIPELINE, torch.float32, None)


def outside_index(component: str, stem: str) -> Breakage:
    """Move the component's weights out of the model folder and write an index that names them there."""

    def change(folder: Path) -> None:
        file = folder / component / f"{stem}.safetensors"
        names = list(load_file(file))
        outside_of(folder).mkdir()
        file.rename(outside_of(folder) / "x.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside/x.safetensors")}
        (folder / component / f"{stem}.safetensors.index.json").write_text(json.dumps(index))

    return change


def decoy(component: str, stem: str) -> Breakage:
    """Write a valid weight file under the name that the component's library does not read."""
    return lambda folder: save_file({"w": torch.zeros(1)}, folder / component / f"{stem}.safetensors")


NAMES_OUTSIDE = "names '../../outside/x.safetensors', which is not a file of the same folder"


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (
            both(outside_index("text_encoder", "model"), decoy("text_encoder", STEM)),
            f"text_encoder/{INDEX} {NAMES_OUTSIDE}",
        ),
        (both(outside_index("vae", STEM), decoy("vae", "model")), f"vae/{STEM}.safetensors.index.json {NAMES_OUTSIDE}"),
        (
            both(outside_index("safety_checker", "model"), decoy("safety_checker", STEM)),
            f"safety_checker/ has weight files named {STEM} and model: remove those that",
        ),
        (outside_index("safety_checker", "model"), f"safety_checker/{INDEX} {NAMES_OUTSIDE}"),
        (moved(f"vae/{STEM}.safetensors", "vae/model.safetensors"), f"vae/ has no .safetensors file named {STEM} ("),
        (
            moved("text_encoder/model.safetensors", f"text_encoder/{STEM}.safetensors"),
            "text_encoder/ has no .safetensors file named model (",
        ),
        (text("text_encoder/adapter_config.json", "{}"), "text_encoder/ has an adapter_config.json"),
        (
            values("text_encoder/config.json", transformers_weights="other.safetensors.index.json"),
            "text_encoder/config.json: transformers_weights must be left out, got 'other",
        ),
        (
            linked_outside("text_encoder/generation_config.json"),
            "cannot read text_encoder/generation_config.json: it is",
        ),
        (linked_outside("tokenizer/chat_template.jinja"), "cannot read tokenizer/chat_template.jinja: it is a link to"),
        (linked_outside("tokenizer/more/tools.jinja"), "cannot read tokenizer/more/tools.jinja: it is a link to"),
        (linked_outside("tokenizer/more"), "cannot read tokenizer/more: it is a link to"),
    ],
)
def test_nothing_outside_the_folder_is_accepted(
    breakage: Breakage, words: str, model_of: ModelOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    (folder / "tokenizer" / "more").mkdir()
    for name in ("text_encoder/generation_config.json", "tokenizer/chat_template.jinja", "tokenizer/more/tools.jinja"):
        (folder / name).write_text("{}")
    AsyncOmni(model=str(folder))
    breakage(folder)
    with pytest.raises(ConfigError) as caught:
        AsyncOmni(model=str(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_worker_reads_the_files_that_were_checked(model_of: ModelOf, tmp_path: Path) -> None:
    """Valid files under the other library's name change nothing, with and without a variant."""
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    moved("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors")(folder)
    decoy("text_encoder", STEM)(folder)
    decoy("vae", "model")(folder)
    AsyncOmni(model=str(folder), variant="fp16")
    pipeline = load_pipeline(folder, PIPELINE, torch.float32, "fp16")
    stored = load_file(folder / "text_encoder/model.fp16.safetensors")
    held = dict(pipeline.text_encoder.named_parameters())
    assert all(torch.equal(held[name], weight) for name, weight in stored.items())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_an_index_that_differs_from_its_shards_loads_as_elsewhere(
    component: str, model_of: ModelOf, tmp_path: Path
) -> None:
    """Entries of weights that there are not or in another shard, and a weight in two shards."""
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    stem = STEM if component == "unet" else "model"
    first, second = (f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2))

    def stale(weight_map: dict[str, str]) -> None:
        weight_map |= {"gone.weight": first, min(weight_map): second}

    sharded(component, stem, stale)(folder)
    index = folder / component / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    (name, weight), *_ = load_file(folder / component / first).items()
    weights(f"{component}/{second}", lambda held: held.update({name: weight.numpy()}))(folder)
    AsyncOmni(model=str(folder))
    load_pipeline(folder, PIPELINE, torch.float32, None)


def test_components_are_those_of_the_index(model_of: ModelOf) -> None:
    folder = model_of("HunyuanVideo15Pipeline")
    components = read_components(read_object(folder, MODEL_INDEX))
    assert components["guider"] == Component("diffusers", "ClassifierFreeGuidance")
    assert components["guider"].kind == "guider"
    assert list(component_classes(folder)) == list(components)
