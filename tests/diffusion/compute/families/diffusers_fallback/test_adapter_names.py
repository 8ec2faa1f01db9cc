"""An adapter of any naming is in the model with all its keys and alphas, or it is refused: merged weights are the
oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from testbed.runner_driver import Drive, psnr
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from tests.diffusion.compute.families.diffusers_fallback.test_pictures import PROMPT, request_of
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.diffusers_fallback.adapter_check import unplaced_keys
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.adapter_files import AdapterPaths
from vllm_omni.omni import Omni

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
FLUX, SD, SD3, SDXL = (
    "FluxPipeline",
    "StableDiffusionPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionXLPipeline",
)
FIELDS: dict[str, dict[str, Any]] = {
    FLUX: {"guidance_scale": 3.5, "max_sequence_length": 64},
    SD: {"guidance_scale": 5.0},
    SD3: {"guidance_scale": 5.0, "max_sequence_length": 64},
    SDXL: {"guidance_scale": 5.0},
}
CLIP_LAYERS = ("layers.0.self_attn.q_proj", "layers.1.mlp.fc1")
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    FLUX: {
        "transformer": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v"),
        "text_encoder": CLIP_LAYERS,
    },
    SD3: {"transformer": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v")},
    SDXL: {
        "unet": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
        ),
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
    },
}
LAYERS[SD] = {component: LAYERS[SDXL][component] for component in ("unet", "text_encoder")}
RANK = 4


@dataclass(frozen=True)
class Layer:
    """A change of one weight, alpha / rank * up @ down."""

    component: str
    name: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def delta(self) -> Tensor:
        return self.alpha / len(self.down) * self.up @ self.down


def pipeline_of(model: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    return pipeline


def layer_of(pipeline: Any, component: str, name: str) -> Any:
    """CLIP's layers lie in `encoder`, that of some versions in `text_model`."""
    modules = dict(getattr(pipeline, component).named_modules())
    return next(module for path, module in modules.items() if path == name or path.endswith(f"encoder.{name}"))


def draw(pipeline: Any, layers: Mapping[str, tuple[str, ...]], seed: int, alphas: tuple[float, ...]) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Layer] = []
    for component, names in layers.items():
        for name in names:
            outputs, inputs = layer_of(pipeline, component, name).weight.shape
            down, up = (0.5 * torch.randn(shape, generator=generator) for shape in ((RANK, inputs), (outputs, RANK)))
            drawn.append(Layer(component, name, down, up, alphas[len(drawn) % len(alphas)]))
    return drawn


def merged_picture(pipeline: Any, layers: list[Layer], scale: float, **fields: Any) -> np.ndarray:
    """By weights that the changes were added to by hand."""
    weights = [layer_of(pipeline, layer.component, layer.name).weight.data for layer in layers]
    for weight, layer in zip(weights, layers, strict=True):
        weight += scale * layer.delta
    generator = torch.Generator("cpu").manual_seed(3)
    values = {"height": 64, "width": 64, "num_inference_steps": 4, **fields}
    picture = np.array(pipeline(prompt=PROMPT, generator=generator, **values).images[0])
    for weight, layer in zip(weights, layers, strict=True):
        weight -= scale * layer.delta
    return picture


Naming = Callable[[Layer], dict[str, Tensor]]


def path_of(layer: Layer) -> str:
    return f"text_model.encoder.{layer.name}" if layer.component.startswith("text_encoder") else layer.name


def kohya(layer: Layer) -> dict[str, Tensor]:
    prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}.get(layer.component, "lora_unet_")
    name = prefix + path_of(layer).replace(".", "_")
    return {
        f"{name}.lora_down.weight": layer.down,
        f"{name}.lora_up.weight": layer.up,
        f"{name}.alpha": torch.tensor(layer.alpha),
    }


def one_trainer(layer: Layer) -> dict[str, Tensor]:
    """The names of diffusers with those of Kohya for the weights."""
    name = f"{layer.component}.{path_of(layer)}"
    return {
        f"{name}.lora_down.weight": layer.down,
        f"{name}.lora_up.weight": layer.up,
        f"{name}.alpha": torch.tensor(layer.alpha),
    }


def one_trainer_flux(layer: Layer) -> dict[str, Tensor]:
    prefix = "lora_te1_" if layer.component == "text_encoder" else "lora_transformer_"
    name = prefix + path_of(layer).replace(".", "_")
    return {
        f"{name}.lora_down.weight": layer.down,
        f"{name}.lora_up.weight": layer.up,
        f"{name}.alpha": torch.tensor(layer.alpha),
    }


def peft(layer: Layer) -> dict[str, Tensor]:
    """Alphas lie in the header."""
    name = f"{layer.component}.{path_of(layer)}"
    return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}


def peft_with_alphas(layer: Layer) -> dict[str, Tensor]:
    return {**peft(layer), f"{layer.component}.{path_of(layer)}.alpha": torch.tensor(layer.alpha)}


def header(layers: list[Layer]) -> dict[str, str]:
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(layer.component for layer in layers):
        mine = [layer for layer in layers if layer.component == component]
        names = [path_of(layer).removeprefix("text_model.") for layer in mine]
        settings |= {
            f"{component}.r": RANK,
            f"{component}.lora_alpha": mine[0].alpha,
            f"{component}.alpha_pattern": {name: layer.alpha for name, layer in zip(names, mine, strict=True)},
            f"{component}.target_modules": names,
        }
    return {"lora_adapter_metadata": json.dumps(settings), "format": "pt"}


def save(layers: list[Layer], naming: Naming, file: Path, **more: Tensor) -> Path:
    weights = {key: weight for layer in layers for key, weight in naming(layer).items()}
    weights = {key: weight.clone() for key, weight in {**weights, **more}.items()}  # none shares memory
    save_file(weights, file, header(layers) if naming is peft else {"format": "pt"})
    return file


def start(model: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(model), **settings), load_model_info(str(model)))
    runner.start()
    if hasattr(runner.pipeline.pipeline, "safety_checker"):  # type: ignore[attr-defined]
        runner.pipeline.pipeline.safety_checker = None  # type: ignore[attr-defined]
    return runner


NAMINGS: list[tuple[str, Naming, tuple[float, ...]]] = [
    (FLUX, peft_with_alphas, (2.0, 8.0)),
    (FLUX, one_trainer_flux, (2.0, 8.0)),
    (SD, kohya, (80.0, 320.0)),  # its pictures follow weak changes little
    (SDXL, kohya, (2.0, 8.0, 1.0)),
    (SDXL, peft, (2.0, 8.0, 1.0)),
    (SDXL, one_trainer, (2.0, 8.0, 1.0)),
    (SD3, peft, (2.0, 8.0)),
]


FURTHER_NAMINGS: list[tuple[str, Naming, tuple[float, ...]]] = [
    (FLUX, peft, (2.0, 8.0)),
    (FLUX, one_trainer, (2.0, 8.0)),
    (SDXL, kohya, (2.0,)),
    (SDXL, one_trainer, (2.0,)),
    (SD3, one_trainer, (2.0, 8.0)),
]


@pytest.mark.parametrize(
    ("name", "naming", "alphas"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1].__name__}-{len(case[2])}", marks=marks)
        for cases, marks in ((NAMINGS, ()), (FURTHER_NAMINGS, pytest.mark.thorough))
        for case in cases
    ],
)
def test_an_adapter_is_its_merged_weights(
    model_of: ModelOf, tmp_path: Path, name: str, naming: Naming, alphas: tuple[float, ...]
) -> None:
    pipeline = pipeline_of(model_of(name))
    layers = draw(pipeline, LAYERS[name], 1, alphas)
    file = save(layers, naming, tmp_path / "style.safetensors")
    request = request_of("a", seed=3, loras=(LoRA("style", str(file), 0.8),), **FIELDS[name])
    drive = Drive(start(model_of(name), lora_modules={"style": str(file)})).run({0: [request]})
    assert not drive.errors
    assert psnr(drive.images["a"], merged_picture(pipeline, layers, 0.8, **FIELDS[name])) >= 55
    assert psnr(drive.images["a"], merged_picture(pipeline, [], 0.8, **FIELDS[name])) < 50


def test_an_old_diffusers_name_and_its_partner_are_one_layer(model_of: ModelOf, tmp_path: Path) -> None:
    """Layers of another rank each, and names from before peft; nothing says alpha, so the scale is 1."""
    pipeline = pipeline_of(model_of(SDXL))
    layers = [replace(layer, alpha=RANK) for layer in draw(pipeline, LAYERS[SDXL], 2, (RANK,))]
    layers[0] = replace(layers[0], down=layers[0].down[:2], up=layers[0].up[:, :2].contiguous(), alpha=2.0)

    def old(layer: Layer) -> dict[str, Tensor]:
        name = f"{layer.component}.{path_of(layer)}"
        marks = ("lora_linear_layer.down", "lora_linear_layer.up") if "text" in name else ("lora.down", "lora.up")
        return {f"{name}.{mark}.weight": weight for mark, weight in zip(marks, (layer.down, layer.up), strict=True)}

    file = save(layers, old, tmp_path / "old.safetensors")
    request = request_of("a", seed=3, loras=(LoRA("old", str(file), 1.0),), **FIELDS[SDXL])
    drive = Drive(start(model_of(SDXL))).run({0: [request]})
    assert not drive.errors, drive.errors
    assert psnr(drive.images["a"], merged_picture(pipeline, layers, 1.0, **FIELDS[SDXL])) >= 55


def test_settings_of_peft_beside_the_weights_are_read(model_of: ModelOf, tmp_path: Path) -> None:
    pipeline = pipeline_of(model_of(SDXL))
    layers = draw(pipeline, {"unet": LAYERS[SDXL]["unet"]}, 3, (6.0, 2.0))
    pattern = {layers[1].name.rpartition(".")[2]: 2.0}
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": pattern, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    def by_peft(layer: Layer) -> dict[str, Tensor]:
        return {f"base_model.model.{key.removeprefix('unet.')}": weight for key, weight in peft(layer).items()}

    weights = {key: weight for layer in layers for key, weight in by_peft(layer).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    request = request_of(
        "a", loras=(LoRA("p", str(tmp_path / "adapter_model.safetensors"), 1.0),), seed=3, **FIELDS[SDXL]
    )
    drive = Drive(start(model_of(SDXL))).run({0: [request]})
    assert not drive.errors, drive.errors
    rooted = [replace(layer, alpha=layer.alpha * RANK**0.5) for layer in layers]  # alpha / sqrt(rank)
    assert psnr(drive.images["a"], merged_picture(pipeline, rooted, 1.0, **FIELDS[SDXL])) >= 55


def refused_adapters(layers: list[Layer]) -> dict[str, tuple[Naming, dict[str, Tensor]]]:
    """By what is said of each: a naming, and weights beside those of `layers`."""
    wide, tall = torch.ones(RANK, 32), torch.ones(32, RANK)

    def pair(name: str, down: Tensor = wide, up: Tensor = tall) -> dict[str, Tensor]:
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}

    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    block = "transformer.transformer_blocks.7.attn.to_q"
    some = "transformer.transformer_blocks.0.attn.to_k"
    kohya_t5 = f"lora_te3_{t5.removeprefix('text_encoder_2.').replace('.', '_')}"
    return {
        f"with their alphas: {t5}.lora_A.weight, {t5}.lora_B.weight$": (peft_with_alphas, pair(t5)),
        f"with their alphas: {block}.lora_A.weight, {block}.lora_B.weight$": (peft_with_alphas, pair(block)),
        f"with their alphas: {kohya_t5}.lora_down.weight": (
            one_trainer_flux,
            {f"{kohya_t5}.lora_down.weight": wide, f"{kohya_t5}.lora_up.weight": tall},
        ),
        f"with their alphas: {some}.alpha$": (peft, {f"{some}.alpha": torch.tensor(2.0)}),
        f"{some}.lora_A.weight has no partner": (peft, {f"{some}.lora_A.weight": torch.ones(RANK, 48)}),
        f"{some}.lora_A.weight has rank 0": (peft, pair(some, torch.ones(0, 48), torch.ones(48, 0))),
        "do not fit together": (peft, pair(some, torch.ones(2, 48), torch.ones(48, 3))),
        "size mismatch|shape": (peft, pair(some, torch.ones(2, 48), torch.ones(50, 2))),
        "holds values that are not numbers": (peft, pair(some, torch.full((2, 48), float("nan")), torch.ones(48, 2))),
        "takes one number": (
            peft,
            {**pair(some, torch.ones(2, 48), torch.ones(48, 2)), f"{some}.alpha": torch.ones(3)},
        ),
    }


def test_an_adapter_that_fits_in_part_is_refused_with_its_keys(model_of: ModelOf, tmp_path: Path) -> None:
    """At a start, and for a request that brings the file; what is loaded beside it stays as it was."""
    pipeline = pipeline_of(model_of(FLUX))
    layers = draw(pipeline, LAYERS[FLUX], 1, (2.0, 8.0))
    good = save(layers, peft, tmp_path / "good.safetensors")
    runner = start(model_of(FLUX), lora_modules={"good": str(good)})
    fine = request_of("fine", seed=3, loras=(LoRA("good", str(good), 1.0),), **FIELDS[FLUX])
    before = Drive(runner).run({0: [fine]}).images["fine"]
    for number, (words, (naming, more)) in enumerate(refused_adapters(layers).items()):
        file = save(layers, naming, tmp_path / f"{number}.safetensors", **more)
        bad = request_of("bad", seed=3, loras=(LoRA("bad", str(file), 1.0),), **FIELDS[FLUX])
        drive = Drive(runner).run({0: [fine], 1: [bad]})
        assert (drive.errors["bad"].kind, drive.errors["bad"].param) == ("invalid", "lora_request")
        assert re.search(words, drive.errors["bad"].message), drive.errors["bad"].message
        assert np.array_equal(drive.images["fine"], before)
    with pytest.raises(ConfigError, match=f"^--lora-modules bad: .*{words}"):
        Omni(str(model_of(FLUX)), lora_modules={"bad": str(file)}, distributed_executor_backend="uni")


def test_the_keys_are_named_and_counted(model_of: ModelOf, tmp_path: Path) -> None:
    layers = draw(pipeline_of(model_of(FLUX)), LAYERS[FLUX], 1, (2.0,))
    others = draw(pipeline_of(model_of(FLUX)), LAYERS[FLUX], 2, (2.0,))
    moved = [replace(layer, component="text_encoder_2") for layer in others]
    file = save([*layers, *moved], peft_with_alphas, tmp_path / "moved.safetensors")
    request = request_of("moved", loras=(LoRA("moved", str(file), 1.0),), **FIELDS[FLUX])
    message = Drive(start(model_of(FLUX))).run({0: [request]}).errors["moved"].message
    assert re.search(r"text_encoder_2\.[^,]*, text_encoder_2\.[^,]*, text_encoder_2\.[^,]* and 5 more$", message)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_that_is_split_keeps_its_change(model_of: ModelOf, tmp_path: Path, sparse: bool) -> None:
    """Kohya's Flux has one layer for queries, keys and values; sparse: each of them uses its own part of the rank."""
    pipeline = pipeline_of(model_of(FLUX))
    rank, width, alpha = 6, 48, 3.0
    generator = torch.Generator().manual_seed(5)
    down, up = (torch.randn(shape, generator=generator) for shape in ((rank, width), (3 * width, rank)))
    if sparse:
        up *= torch.block_diag(*[torch.ones(width, rank // 3)] * 3)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = tmp_path / "kohya.safetensors"
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    save_file(weights, file)
    layers = [
        Layer("transformer", f"transformer_blocks.0.attn.{part}", down, rows, alpha)
        for part, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True)
    ]
    request = request_of("a", seed=3, loras=(LoRA("k", str(file), 1.0),), **FIELDS[FLUX])
    drive = Drive(start(model_of(FLUX))).run({0: [request]})
    assert not drive.errors, drive.errors
    assert psnr(drive.images["a"], merged_picture(pipeline, layers, 1.0, **FIELDS[FLUX])) >= 55


def test_a_kronecker_product_is_its_merged_weights(model_of: ModelOf, tmp_path: Path) -> None:
    """LoKr, with a factor that is stored whole and one that is a product; its alpha belongs to the rank of that one."""
    name, rank, alpha = "Flux2KleinPipeline", 2, 1.0
    pipeline = pipeline_of(model_of(name))
    generator = torch.Generator().manual_seed(5)
    outputs, inputs = layer_of(pipeline, "transformer", "transformer_blocks.0.attn.to_q").weight.shape
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (outputs // 4, rank), "lokr_w2_b": (rank, inputs // 4)}
    weights = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    file = tmp_path / "lokr.safetensors"
    key = "lycoris_transformer_blocks_0_attn_to_q"
    save_file({**{f"{key}.{p}": w for p, w in weights.items()}, f"{key}.alpha": torch.tensor(alpha)}, file)
    delta = torch.kron(weights["lokr_w1"], weights["lokr_w2_a"] @ weights["lokr_w2_b"])
    layer = Layer("transformer", "transformer_blocks.0.attn.to_q", torch.eye(inputs), delta, inputs * alpha / rank)
    fields: dict[str, Any] = {"guidance_scale": 1.0, "max_sequence_length": 64}
    request = request_of("a", seed=3, loras=(LoRA("k", str(file), 1.0),), **fields)
    drive = Drive(start(model_of(name))).run({0: [request]})
    assert not drive.errors, drive.errors
    assert psnr(drive.images["a"], merged_picture(pipeline, [layer], 1.0, **fields)) >= 55


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.thorough)])
def test_models_of_16_bits_take_adapters_by_their_rounded_weights(
    model_of: ModelOf, tmp_path: Path, dtype: str
) -> None:
    for name, naming in ((FLUX, peft_with_alphas), (SDXL, kohya), (SD3, peft)):
        layers = draw(pipeline_of(model_of(name)), LAYERS[name], 4, (2.0, 8.0, 4.0))
        file = save(layers, naming, tmp_path / f"{name}.safetensors")
        runner: Any = start(model_of(name), dtype=dtype)
        runner.pipeline.load_adapter(LoRA("style", str(file), 1.0).key)
    # An alpha that is a tenth larger is seen.
    layers[0] = replace(layers[0], alpha=1.1 * layers[0].alpha)
    other = AdapterFile.read(AdapterPaths.at(save(layers, naming, tmp_path / "other.safetensors")))
    models = [part for part in runner.pipeline.pipeline.components.values() if isinstance(part, nn.Module)]
    assert unplaced_keys(AdapterFile.read(AdapterPaths.at(file)), models, "adapter_0") == []
    assert unplaced_keys(other, models, "adapter_0") == list(naming(layers[0]))


def test_magnitudes_are_diffusers_own(model_of: ModelOf, tmp_path: Path) -> None:
    """DoRA, which has a further weight for each layer."""
    pipeline = pipeline_of(model_of(SDXL))
    layers = draw(pipeline, {"unet": LAYERS[SDXL]["unet"]}, 6, (RANK,))
    more = {
        f"unet.{layer.name}.lora_magnitude_vector": 1 + torch.rand(len(layer.up), generator=torch.Generator())
        for layer in layers
    }
    file = tmp_path / "dora.safetensors"
    save_file({key: w for layer in layers for key, w in peft(layer).items()} | more, file)
    request = request_of("a", seed=3, loras=(LoRA("d", str(file), 1.0),), **FIELDS[SDXL])
    drive = Drive(start(model_of(SDXL))).run({0: [request]})
    assert not drive.errors, drive.errors
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="d")
    assert psnr(drive.images["a"], merged_picture(pipeline, [], 1.0, **FIELDS[SDXL])) >= 55
    pipeline.unload_lora_weights()
    assert psnr(drive.images["a"], merged_picture(pipeline, layers, 1.0, **FIELDS[SDXL])) < 50  # without the magnitudes
