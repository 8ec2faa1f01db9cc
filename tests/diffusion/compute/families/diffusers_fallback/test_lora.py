"""With an adapter a picture is the one that diffusers makes with it, whatever runs beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from testbed.runner_driver import Drive, psnr
from testbed.tiny_diffusers import save_tiny_adapter
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from tests.diffusion.compute.families.diffusers_fallback.test_pictures import PROMPT, request_of
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.open_adapters import open_adapter
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.adapter_files import WEIGHTS, file_stamp
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
FLUX, SDXL = "FluxPipeline", "StableDiffusionXLPipeline"
FIELDS: dict[str, dict[str, Any]] = {
    FLUX: {"guidance_scale": 3.5, "max_sequence_length": 64},
    SDXL: {"guidance_scale": 5.0},
}

AdapterOf = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def adapter_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> AdapterOf:
    """The file of an adapter of a pipeline class; those of odd numbers are also in the text encoder."""

    @cache
    def save(name: str, number: int) -> Path:
        folder = tmp_path_factory.mktemp("adapters") / f"{name}-{number}"
        return save_tiny_adapter(model_of(name), folder, number, with_text_encoder=number % 2 == 1) / WEIGHTS

    return save


def start(model: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(model), **settings), load_model_info(str(model)))
    runner.start()
    return runner


def oracle(
    model: Path, adapter: Path | None, scale: float, second: tuple[Path, float] | None = None, **fields: Any
) -> np.ndarray:
    """Picture that diffusers makes without this project. second: a further adapter with its scale."""
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name, adapter_name="style")
        pipeline.set_adapters("style", scale)
        if second is not None:
            pipeline.load_lora_weights(str(second[0].parent), weight_name=second[0].name, adapter_name="second")
            pipeline.set_adapters(["style", "second"], [scale, second[1]])
    values = {"height": 64, "width": 64, "num_inference_steps": 4, **fields}
    return np.array(pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(3), **values).images[0])


@pytest.mark.parametrize("name", [FLUX, pytest.param(SDXL, marks=pytest.mark.thorough)])
def test_pictures_with_adapters_are_diffusers_own_alone_and_together(
    model_of: ModelOf, adapter_of: AdapterOf, name: str
) -> None:
    """Two adapters, one of them at two scales, and none, each begun while the others stand between two steps."""
    first, second = (adapter_of(name, number) for number in (0, 1))
    wanted: dict[str, LoRA | None] = {
        "first": LoRA("a", str(first), 1.0),
        "second": LoRA("b", str(second), 1.0),
        "none": None,
        "half": LoRA("b", str(second), 0.5),
    }
    requests = [
        request_of(n, seed=3, loras=() if lora is None else (lora,), **FIELDS[name]) for n, lora in wanted.items()
    ]
    runner = start(model_of(name), lora_modules={"a": str(first), "b": str(second.parent)})
    alone = {r.request_id: Drive(runner).run({0: [r]}).images[r.request_id] for r in requests}
    together = Drive(runner).run({step: [request] for step, request in enumerate(requests)})
    assert not together.errors
    plain = oracle(model_of(name), None, 1.0, **FIELDS[name])
    for request_id, lora in wanted.items():
        assert np.array_equal(together.images[request_id], alone[request_id])
        expected = plain if lora is None else oracle(model_of(name), Path(lora.path), lora.scale, **FIELDS[name])
        assert psnr(alone[request_id], expected) >= 60
        assert lora is None or psnr(alone[request_id], plain) < 50  # the adapters do something
    assert psnr(alone["second"], alone["half"]) < 50


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_request_with_several_adapters_has_their_sum(model_of: ModelOf, adapter_of: AdapterOf) -> None:
    first, second = (adapter_of(SDXL, number) for number in (0, 1))
    both = LoRA("a", str(first), 0.5), LoRA("b", str(second), 0.8)
    requests = {n: request_of(n, seed=3, loras=loras, **FIELDS[SDXL]) for n, loras in (("both", both), ("a", both[:1]))}
    made = Drive(start(model_of(SDXL))).run({0: [requests["both"]], 1: [requests["a"]]})
    assert not made.errors
    one = oracle(model_of(SDXL), first, 0.5, **FIELDS[SDXL])
    assert psnr(made.images["both"], oracle(model_of(SDXL), first, 0.5, (second, 0.8), **FIELDS[SDXL])) >= 60
    assert psnr(made.images["a"], one) >= 60
    assert psnr(made.images["both"], one) < 50


def test_adapters_are_loaded_once_and_dropped_by_plans_or_for_lack_of_memory(
    model_of: ModelOf, adapter_of: AdapterOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = start(model_of(SDXL))
    pipeline: Any = runner.pipeline
    load = Mock(side_effect=pipeline.pipeline.load_lora_weights)
    monkeypatch.setattr(pipeline.pipeline, "load_lora_weights", load)
    loras = [LoRA("style", str(adapter_of(SDXL, number)), 1.0) for number in range(3)]
    pictures: dict[int, np.ndarray] = {}

    def held() -> int:
        return len(pipeline.pipeline.get_list_adapters().get("unet", ()))

    for number in (1, 2, 0, 1, 2):
        fields = FIELDS[SDXL] | {"num_inference_steps": 2}
        drive = Drive(runner).run({0: [request_of("a", loras=(loras[number],), **fields)]})
        assert not drive.errors
        assert np.array_equal(pictures.setdefault(number, drive.images["a"]), drive.images["a"])
    assert (load.call_count, held()) == (3, 3)
    runner.execute(StepPlan(100, drop_adapters=[loras[0].key, loras[1].key, AdapterKey("/never")]))
    assert held() == 1
    (loaded,) = runner.execute(StepPlan(101, load_adapters=[loras[0].key])).adapters
    assert (loaded.error, load.call_count, held()) == (None, 4, 2)
    runner.execute(StepPlan(102, new_requests=[request_of("b", loras=(loras[0],))], encode=["b"]))
    with torch.inference_mode():  # like the runner's steps
        pipeline.release_memory()
    assert held() == 1, "that of a request stays"
    runner.execute(StepPlan(103, release=["b"]))


def test_an_adapter_that_is_not_deleted_costs_no_step_and_is_deleted_later(
    model_of: ModelOf, adapter_of: AdapterOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = start(model_of(SDXL))
    pipeline: Any = runner.pipeline
    delete = pipeline.pipeline.delete_adapters

    def fail(name: str) -> None:
        raise KeyError(name)

    first, second = (LoRA("style", str(adapter_of(SDXL, number)), 1.0) for number in (0, 1))
    plain, adapted = (request_of("a", seed=3, loras=loras, **FIELDS[SDXL]) for loras in ((), (second,)))
    wanted = [Drive(runner).run({0: [request]}).images["a"] for request in (plain, adapted)]
    runner.execute(StepPlan(100, load_adapters=[first.key]))
    monkeypatch.setattr(pipeline.pipeline, "delete_adapters", fail)
    runner.execute(StepPlan(101, drop_adapters=[first.key]))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("vllm_omni")]
    assert lines == ["an idle LoRA adapter is not deleted yet: KeyError: 'adapter_1'"]
    for request, picture in zip((plain, adapted), wanted):
        assert np.array_equal(Drive(runner).run({0: [request]}).images["a"], picture)
    monkeypatch.setattr(pipeline.pipeline, "delete_adapters", delete)
    runner.execute(StepPlan(102, drop_adapters=[second.key]))
    assert "unet" not in pipeline.pipeline.get_list_adapters()


def test_a_file_that_is_gone_is_loaded_again_from_its_open_file(
    model_of: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    file = Path(shutil.copy(adapter_of(SDXL, 0), tmp_path / "ink.safetensors"))
    key = AdapterKey(str(file), file_stamp(str(file)))
    runner, kept = start(model_of(SDXL)), open_adapter(key)
    assert kept is not None
    lora = LoRA("ink", key.file, 1.0, key.stamp)
    request = request_of("a", seed=3, loras=(lora,), **FIELDS[SDXL])
    runner.pipeline.read_adapter(key, kept.files)
    file.unlink()
    pictures = []
    for _ in range(2):
        pictures.append(Drive(runner).run({0: [request]}).images["a"])
        with torch.inference_mode():  # like the runner's steps
            runner.pipeline.release_memory()
    assert np.array_equal(pictures[0], pictures[1])
    assert psnr(pictures[0], oracle(model_of(SDXL), adapter_of(SDXL, 0), 1.0, **FIELDS[SDXL])) >= 60
    runner.forget_adapters([key])
    (loaded,) = runner.execute(StepPlan(100, load_adapters=[key])).adapters
    assert loaded.error is not None
    assert loaded.error.message.endswith("cannot be read: its file is gone")


def bad_adapters(good: Path, folder: Path) -> dict[str, Path]:
    """By what is said of each."""
    weights = load_file(good)
    files = {name: folder / f"{name}.safetensors" for name in ("foreign", "base", "wide", "long", "broken")}
    save_file({f"other_model.{key}": weight for key, weight in weights.items()}, files["foreign"])
    save_file({**weights, "unet.conv_in.weight": torch.zeros(3)}, files["base"])
    key = next(key for key in weights if key.endswith("lora_A.weight"))
    save_file({**weights, key: torch.zeros(4, 1000)}, files["wide"])
    key = next(key for key in weights if key.startswith("unet") and key.endswith("lora_B.weight"))
    save_file({**weights, key: torch.zeros(1000, 4)}, files["long"])
    files["broken"].write_bytes(b"no safetensors")
    return {
        "none of its weights has a layer here": files["foreign"],
        "unet.conv_in.weight is no part of an adapter": files["base"],
        r"has the shape \[4, 1000\]": files["wide"],
        "size mismatch": files["long"],
        "does not fit this model: .*header": files["broken"],
    }


@pytest.mark.thorough
def test_what_does_not_fit_ends_its_load_or_its_request_alone(
    model_of: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    good = LoRA("good", str(adapter_of(SDXL, 1)), 1.0)
    runner = start(model_of(SDXL))
    before = Drive(runner).run({0: [request_of("a", **FIELDS[SDXL])]}).images["a"]
    styled = Drive(runner).run({0: [request_of("a", loras=(good,), **FIELDS[SDXL])]}).images["a"]
    for words, file in bad_adapters(adapter_of(SDXL, 1), tmp_path).items():
        (loaded,) = runner.execute(StepPlan(100, load_adapters=[AdapterKey(str(file))])).adapters
        assert loaded.error is not None
        assert re.search(words, loaded.error.message)
        bad = request_of("bad", loras=(LoRA("bad", str(file), 1.0),), **FIELDS[SDXL])
        plain, other = request_of("plain", **FIELDS[SDXL]), request_of("good", loras=(good,), **FIELDS[SDXL])
        drive = Drive(runner).run({0: [plain, other], 1: [bad]})
        assert drive.errors["bad"].kind == "invalid"
        assert np.array_equal(drive.images["plain"], before)
        assert np.array_equal(drive.images["good"], styled)


@pytest.mark.parametrize("kind", ["absent", "pickle", "folder without", "folder of two"])
def test_only_safetensors_that_exist_are_taken(
    model_of: ModelOf, adapter_of: AdapterOf, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / {"absent": "no.safetensors", "pickle": WEIGHTS.replace(".safetensors", ".bin")}.get(kind, "dir")
    if kind == "pickle":
        torch.save(load_file(adapter_of(SDXL, 0)), path)
    elif kind != "absent":
        path.mkdir()
        torch.save({}, path / "pytorch_lora_weights.bin")
        for name in ("one", "two") if kind == "folder of two" else ():
            shutil.copy(adapter_of(SDXL, 0), path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"^--lora-modules style takes a .*safetensors file"):
        AsyncOmni(model=str(model_of(SDXL)), lora_modules={"style": str(path)})


async def test_a_script_brings_names_or_paths(model_of: ModelOf, adapter_of: AdapterOf) -> None:
    served, other = adapter_of(SDXL, 0), adapter_of(SDXL, 1)
    omni = AsyncOmni(
        model=str(model_of(SDXL)), lora_modules={"served": str(served)}, distributed_executor_backend="uni"
    )
    await omni.start()
    try:
        fields: dict[str, Any] = {"seed": 3, "output_type": "np", **FIELDS[SDXL]}
        for lora, scale, file, used in (
            (LoRARequest("served"), None, served, 1.0),
            (LoRARequest("served", scale=2.0), 0.5, served, 0.5),
            (LoRARequest("other", str(other.parent), 0.5), None, other, 0.5),
        ):
            params = OmniDiffusionSamplingParams(lora_request=lora, lora_scale=scale, **fields)
            output = [output async for output in omni.generate(PROMPT, params)][-1]
            assert psnr(output.images[0], oracle(model_of(SDXL), file, used, **FIELDS[SDXL])) >= 60
    finally:
        await omni.close()
