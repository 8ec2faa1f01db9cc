"""Adapter files of trainers: names, alphas, types and shards; refusals by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin, WanLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.tiny_adapters import Pair, random_pairs, save_comfyui, save_kohya, save_peft, with_names_of_wan
from testbed.tiny_models import tiny_transformer
from testbed.tiny_wan import tiny_wan_transformer
from testbed.tiny_z_image import tiny_z_image_transformer
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.qwen_image.pipeline import QwenImagePipeline
from vllm_omni.diffusion.compute.families.qwen_image.transformer import QwenImageTransformer
from vllm_omni.diffusion.compute.families.wan.config import WanConfig
from vllm_omni.diffusion.compute.families.wan.pipeline import WanPipeline
from vllm_omni.diffusion.compute.families.wan.transformer import WanTransformer
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.families.z_image.pipeline import ZImagePipeline
from vllm_omni.diffusion.compute.families.z_image.transformer import ZImageTransformer
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights import adapter_file as adapter_file_module
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile, AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader, diffusers_conversion
from vllm_omni.diffusion.compute.weights.adapter_tensors import MAX_FILE_BYTES, MAX_HEADER_BYTES, TensorHeader
from vllm_omni.inputs.adapter_files import PEFT_CONFIG, PEFT_FILE, WEIGHTS, AdapterPaths, adapter_file

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[Callable[..., Any], type[PackedTransformer], Any, Any]] = {
    "qwen_image": (tiny_transformer, QwenImageTransformer, QwenImageConfig, QwenImagePipeline),
    "z_image": (tiny_z_image_transformer, ZImageTransformer, ZImageConfig, ZImagePipeline),
    "wan": (tiny_wan_transformer, WanTransformer, WanConfig, WanPipeline),
}


class Case:
    """Transformers of one family, of diffusers and ours, without weights that matter."""

    def __init__(self, family: str) -> None:
        build, cls, config, pipeline = FAMILIES[family]
        self.family = family
        self.theirs = build(heads=6 if family == "z_image" else 2)
        self._build: Callable[[Group], Any] = lambda group: cls(config.from_dict(dict(self.theirs.config)), group)
        self._convert = diffusers_conversion(pipeline.adapter_converter)

    def reader(self, group: Group | None = None, dtype: torch.dtype = torch.float32) -> AdapterReader:
        transformer = self._build(group or Group.alone()).to(dtype)
        return AdapterReader([transformer], self._convert, dtype, CPU)

    def read(self, file: Path) -> LoadedAdapter:
        return self.reader().read(AdapterPaths.at(file))

    def pairs(self, part: str = "") -> dict[str, Pair]:
        return random_pairs(self.theirs, 1, part=part)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def qwen() -> Case:
    return Case("qwen_image")


def deltas(adapter: LoadedAdapter) -> dict[str, Tensor]:
    """Change of the weight of each part of each layer: B A, [outputs, inputs]."""
    return {
        f"{path} {up.columns.start}": up.weight @ weights.down[up.ranks]
        for path, weights in adapter.layers[0].items()
        for up in weights.ups
    }


def assert_same(got: LoadedAdapter, wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    found = deltas(got)
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, wanted[name], atol=tolerance, rtol=tolerance)


def test_files_of_all_trainers_make_the_same_changes(case: Case, tmp_path: Path) -> None:
    pairs = case.pairs()
    wanted = deltas(case.read(save_peft(pairs, tmp_path / "peft.safetensors")))
    assert len(wanted) == len(pairs), "every linear layer has a place"
    assert_same(case.read(save_peft(pairs, tmp_path / "bare.safetensors", prefix="")), wanted)
    assert_same(case.read(save_comfyui(pairs, tmp_path / "comfy.safetensors")), wanted)
    assert_same(case.read(save_peft(pairs, tmp_path / "full.safetensors", "model.diffusion_model.")), wanted)
    if case.family != "wan":
        assert_same(case.read(save_kohya(pairs, tmp_path / "kohya.safetensors")), wanted)


@pytest.mark.parametrize("part", ["", "blocks.", "attn1.", "ffn"])
def test_own_names_of_wan_are_known_also_of_few_layers(tmp_path: Path, part: str) -> None:
    """diffusers' conversion of Kohya's names takes files with every layer of every block alone."""
    case = Case("wan")
    pairs = case.pairs(part=part)
    wanted = deltas(case.read(save_peft(pairs, tmp_path / "peft.safetensors")))
    own = with_names_of_wan(pairs)
    assert not own.keys() & pairs.keys()
    comfy = save_comfyui(own, tmp_path / "comfy.safetensors")
    assert_same(case.read(comfy), wanted)
    assert_same(case.read(save_kohya(own, tmp_path / "kohya.safetensors")), wanted)
    save_file(WanLoraLoaderMixin.lora_state_dict(load_file(comfy)), tmp_path / "diffusers.safetensors")
    assert_same(case.read(tmp_path / "diffusers.safetensors"), wanted)


def test_one_pair_may_change_queries_keys_and_values_together(tmp_path: Path) -> None:
    """Z-Image's own code has one layer for them."""
    case = Case("z_image")
    width = case.theirs.config.dim
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    fused = save_peft({"layers.0.attention.qkv": (down, up)}, tmp_path / "fused.safetensors", "diffusion_model.")
    parts = {
        f"layers.0.attention.to_{name}": (down.clone(), part)
        for name, part in zip("qkv", map(torch.clone, up.chunk(3)))
    }
    assert_same(case.read(fused), deltas(case.read(save_peft(parts, tmp_path / "split.safetensors"))))
    # Kohya's trainer has the names of that code, too.
    out = random_pairs(case.theirs, 1, part="layers.0.attention.to_out.0")
    own = {"layers.0.attention.qkv": (down, up), "layers.0.attention.out": out["layers.0.attention.to_out.0"]}
    kohya = case.read(save_kohya(own, tmp_path / "kohya.safetensors"))
    assert_same(kohya, deltas(case.read(save_peft(parts | out, tmp_path / "all.safetensors"))))
    weights = load_file(fused) | load_file(tmp_path / "split.safetensors")
    save_file(weights, tmp_path / "both.safetensors")
    with pytest.raises(AdapterFileError, match=r"two of its layers are transformer.layers.0.attention.to_[qkv]: "):
        case.read(tmp_path / "both.safetensors")
    uneven = {"layers.0.attention.qkv": (down, up[:-1])}
    with pytest.raises(AdapterFileError, match=r"has 3 parts of equal size, its weight has \d+ outputs"):
        case.read(save_peft(uneven, tmp_path / "uneven.safetensors"))


@pytest.mark.parametrize(
    ("family", "name", "parts"),
    [
        ("qwen_image", "transformer_blocks.0.attn.to_qkv", ("to_q", "to_k", "to_v")),
        ("qwen_image", "transformer_blocks.0.attn.to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ("z_image", "layers.0.attention.to_qkv", ("to_q", "to_k", "to_v")),
        ("wan", "blocks.0.attn1.to_qkv", ("to_q", "to_k", "to_v")),
        ("wan", "blocks.0.attn2.to_kv", ("to_k", "to_v")),
    ],
)
def test_fused_projections_have_diffusers_names(tmp_path: Path, family: str, name: str, parts: tuple[str, ...]) -> None:
    case = Case(family)
    attention = name.rpartition(".")[0]
    pairs = [random_pairs(case.theirs, 1, part=f"{attention}.{part}")[f"{attention}.{part}"] for part in parts]
    down = pairs[0][0]
    fused = {name: (down, torch.cat([up for _, up in pairs]))}
    split = {f"{attention}.{part}": (down.clone(), up) for part, (_, up) in zip(parts, pairs)}
    wanted = deltas(case.read(save_peft(split, tmp_path / "split.safetensors")))
    assert_same(case.read(save_peft(fused, tmp_path / "fused.safetensors")), wanted)


def test_a_fused_name_of_two_streams_is_no_layer(qwen: Case, tmp_path: Path) -> None:
    pairs = {"transformer_blocks.0.attn.qkv": (torch.ones(2, 32), torch.ones(96, 2))}
    with pytest.raises(AdapterFileError, match=r"it has transformer.transformer_blocks.0.attn.qkv, the model"):
        qwen.read(save_peft(pairs, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_every_type_are_read(qwen: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in qwen.pairs(part="attn").items()}
    wide = {name: (down.float(), up.float()) for name, (down, up) in pairs.items()}
    wanted = deltas(qwen.read(save_peft(wide, tmp_path / "wide.safetensors")))
    assert_same(qwen.read(save_peft(pairs, tmp_path / "narrow.safetensors")), wanted)


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_float8_weights_with_scales_are_multiplied_out(qwen: Case, tmp_path: Path, end: str, by_row: bool) -> None:
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    wide: dict[str, Tensor] = {}
    plain = load_file(save_peft(qwen.pairs(part="attn"), tmp_path / "plain.safetensors"))
    for key, weight in plain.items():
        scale = weight.abs().amax(1, keepdim=True) / 448 if by_row else weight.abs().max() / 448
        tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[key.removesuffix("weight") + end] = scale
        wide[key] = tensors[key].float() * scale
    save_file(tensors, tmp_path / "scaled.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    got = qwen.read(tmp_path / "scaled.safetensors")
    assert_same(got, deltas(qwen.read(tmp_path / "wide.safetensors")), 1e-6)
    assert_same(got, deltas(qwen.read(tmp_path / "plain.safetensors")), 0.1)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_of_ranks_and_alphas_scale_as_in_peft(tmp_path: Path, use_rslora: bool) -> None:
    """A file that diffusers saves from peft's layers, and the same changes with peft's scales multiplied out."""
    case = Case("qwen_image")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_out.0", "img_mlp.net.2", "proj_out"],
        rank_pattern={"to_k": 2, "transformer_blocks.1.attn.to_q": 3},
        alpha_pattern={"to_q": 8, "proj_out": 1},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    case.theirs.add_adapter(config, "a")
    case.theirs.save_lora_adapter(tmp_path / "of model", "a")
    QwenImageLoraLoaderMixin.save_lora_weights(
        tmp_path / "of pipeline",
        get_peft_model_state_dict(case.theirs, adapter_name="a"),
        transformer_lora_adapter_metadata=case.theirs.peft_config["a"].to_dict(),
    )
    layers = {name: layer for name, layer in case.theirs.named_modules() if hasattr(layer, "lora_A")}
    assert len({(layer.r["a"], layer.scaling["a"]) for layer in layers.values()}) == 5
    pairs = {
        name: (layer.lora_A["a"].weight.detach(), layer.lora_B["a"].weight.detach() * layer.scaling["a"])
        for name, layer in layers.items()
    }
    wanted = deltas(case.read(save_peft(pairs, tmp_path / "plain.safetensors")))
    for folder in ("of model", "of pipeline"):
        assert_same(case.read(tmp_path / folder / WEIGHTS), wanted)


def test_each_layer_has_its_own_rank_and_alpha(qwen: Case, tmp_path: Path) -> None:
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "proj_out")
    pairs: dict[str, Pair] = {}
    for name, rank in zip(layers, (1, 5, 8)):
        pairs |= random_pairs(qwen.theirs, rank, rank=rank, part=name)
    plain = load_file(save_peft(pairs, tmp_path / "plain.safetensors"))
    wanted = deltas(qwen.read(tmp_path / "plain.safetensors"))
    alphas = {"to_q": 2.0, "proj_out": 4.0}  # the scale is alpha / rank
    of_layers = {name: a for end, a in alphas.items() for name in layers if end in name}
    tensors = {f"transformer.{name}.alpha": torch.tensor(a) for name, a in of_layers.items()}
    save_file(plain | tensors, tmp_path / "alphas.safetensors")
    kohya = load_file(save_kohya(pairs, tmp_path / "kohya.safetensors"))
    for name, (down, up) in pairs.items():
        flat = "lora_unet_" + name.replace(".", "_")
        kohya[f"{flat}.lora_up.weight"] = up
        kohya[f"{flat}.alpha"] = torch.tensor(of_layers.get(name, float(len(down))))
    save_file(kohya, tmp_path / "kohya.safetensors")
    settings: dict[str, Any] = {"transformer.r": 5, "transformer.lora_alpha": 5}
    settings["transformer.alpha_pattern"] = {"to_q": 2.0, "proj_out": 4.0}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(plain, tmp_path / "settings.safetensors", metadata=header)
    for name in ("alphas", "settings", "kohya"):
        got = deltas(qwen.read(tmp_path / f"{name}.safetensors"))
        for key, delta in wanted.items():
            factor = 0.5 if "proj_out" in key else 2.0 if key == "transformer_blocks.0.image.qkv 0" else 1.0
            torch.testing.assert_close(got[key], factor * delta)


def test_settings_are_found_beside_links(qwen: Case, tmp_path: Path) -> None:
    """The cache of Hugging Face has a snapshot of links to blobs, which are named by their hash."""
    plain, blobs, snapshot = (tmp_path / name for name in ("plain", "blobs", "snapshot"))
    for folder in (plain, blobs, snapshot):
        folder.mkdir()
    save_file(GOOD, plain / PEFT_FILE)
    (plain / PEFT_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 32}))
    for number, file in enumerate((PEFT_FILE, PEFT_CONFIG)):
        shutil.copy(plain / file, blobs / f"{number}")
        (snapshot / file).symlink_to(f"../blobs/{number}")
    (tmp_path / "ink.safetensors").symlink_to(snapshot / PEFT_FILE)
    (tmp_path / "latest").symlink_to(snapshot)
    wanted = deltas(qwen.read(adapter_file(plain)))
    assert float(next(iter(wanted.values())).abs().max()) == 32  # alpha 32 / rank 2, and a product of 2
    for place in ("snapshot", f"snapshot/{PEFT_FILE}", "ink.safetensors", "latest"):
        assert_same(qwen.read(adapter_file(tmp_path / place)), wanted)


def test_ranks_hold_their_shards(case: Case, tmp_path: Path) -> None:
    file = save_peft(case.pairs(), tmp_path / "a.safetensors")
    whole = case.read(file).layers[0]
    for rank in range(2):
        group = Group((0, 1), rank, Counter())
        reader = case.reader(group)
        for path, weights in reader.read(AdapterPaths.at(file)).layers[0].items():
            layer: Any = reader._transformers[0].get_submodule(path)
            cut = getattr(layer, "cut_dims", {}).get("weight")
            assert weights.down.shape[1] == layer.weight[0].numel()
            for mine, all_ in zip(weights.ups, whole[path].ups, strict=True):
                outputs = len(all_.weight) // 2
                share = slice(rank * outputs, (rank + 1) * outputs) if cut == 0 else slice(None)
                torch.testing.assert_close(mine.weight, all_.weight[share])
                assert mine.columns.stop - mine.columns.start == len(mine.weight)
            inputs = whole[path].down.shape[1] // 2
            share = slice(rank * inputs, (rank + 1) * inputs) if cut == 1 else slice(None)
            torch.testing.assert_close(weights.down, whole[path].down[:, share])


Q = "transformer.transformer_blocks.0.attn.to_q"
GOOD: dict[str, Tensor] = {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {f"{Q}.lora_A.weight": torch.ones(2, 31)},
            r"attn.to_q has 32 inputs and 32 outputs, its weights are \[2, 31\]",
        ),
        ({f"{Q}.lora_B.weight": torch.ones(33, 2)}, r"has 32 inputs and 32 outputs, .* \[33, 2\]"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 3)}, "do not fit together"),
        ({f"{Q}.lora_B.weight": torch.full((32, 2), torch.nan)}, "lora_B.weight holds values that are not numbers"),
        (
            {f"{Q}.lora_A.weight": torch.ones(1025, 32), f"{Q}.lora_B.weight": torch.ones(32, 1025)},
            "rank 1025; ranks of 1 to 1024",
        ),
        ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, "got also .*lora_magnitude_vector"),
        ({f"{Q}.dora_scale": torch.ones(32)}, "got also .*dora_scale"),
        ({f"{Q}.lora_B.bias": torch.ones(32)}, "got also .*lora_B.bias"),
        ({"diffusion_model.img_in.diff": torch.ones(32, 64)}, "got also diffusion_model.img_in.diff"),
        ({"diffusion_model.img_in.diff_b": torch.ones(32)}, "got also diffusion_model.img_in.diff_b"),
        ({"x.hada_w1_a": torch.ones(2, 2)}, "got also x.hada_w1_a"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(16, 16)}, "takes no LoKr weights, got .*to_q"),
        (
            {
                "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 8),
                "text_encoder.layers.0.q_proj.lora_B.weight": torch.ones(8, 2),
            },
            "takes no changes of the text encoder, got text_encoder.layers.0.q_proj",
        ),
        (
            {"lora_te_x.lora_down.weight": torch.ones(2, 8), "lora_te_x.lora_up.weight": torch.ones(8, 2)},
            "takes no changes of the text encoder, got lora_te_x",
        ),
        (
            {f"{Q}.lokr_w1": torch.ones(2), f"{Q}.lokr_w2_a": torch.ones(2), f"{Q}.lokr_w2_b": torch.ones(2)},
            r"lokr_w2_a \[2\] and .*lokr_w2_b \[2\] do not fit",
        ),
        (
            {"te.layers.0.q.lora_A.weight": torch.ones(2, 8), "te.layers.0.q.lora_B.weight": torch.ones(8, 2)},
            "takes no changes of the text encoder, got te.layers.0.q",
        ),
        ({f"{Q}.lora_A.weight_scale": torch.ones(())}, "lora_A.weight_scale is the scale of a float8 weight"),
        (
            {
                f"{Q}.lora_A.weight": torch.ones(2, 32).to(torch.float8_e4m3fn),
                f"{Q}.lora_A.scale_weight": torch.ones(3),
            },
            r"scale_weight takes one number, or one for each of the 2 rows .*, got the shape \[3\]",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, "lora_A.weight takes float64, .* got int8"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32, dtype=torch.bool)}, "lora_A.weight takes float64, .* got bool"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 2, dtype=torch.complex64)}, "takes float64, .* got complex64"),
        ({f"{Q}.alpha": torch.tensor(True)}, "alpha takes float64, .*int64, int32, got bool"),
        ({f"{Q}.alpha": torch.ones(2)}, "alpha takes one number"),
        ({"transformer.img_in.alpha": torch.ones(())}, "these alphas belong to no weights: transformer.img_in.alpha"),
        ({"transformer.img_in.lora_A.weight": torch.ones(2, 64)}, "img_in.lora_A.weight has no partner"),
        (
            {
                "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(2, 32),
                "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(32, 2),
            },
            "two of its layers are transformer.transformer_blocks.0.attn.to_q",
        ),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    qwen: Case, tmp_path: Path, changes: dict[str, Tensor], words: str
) -> None:
    file = tmp_path / "a.safetensors"
    save_file(GOOD, file)
    qwen.read(file)
    save_file(GOOD | changes, file)
    with pytest.raises(AdapterFileError, match=words):
        qwen.read(file)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("5", "lora_adapter_metadata takes a JSON object, got 5"),
        ("[1]", "takes a JSON object"),
        ("[[1, 2]]", "takes a JSON object"),
        ("null", "takes a JSON object"),
        pytest.param("[" * 100000, "takes a JSON object", id="deep"),
        ('{"transformer.lora_alpha": null}', "lora_alpha takes a number from -1e.06 to 1e.06, got None"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha takes a number"),
        ('{"transformer.lora_alpha": {}}', "lora_alpha takes a number"),
        ('{"transformer.lora_alpha": true}', "lora_alpha takes a number"),
        ('{"transformer.lora_alpha": NaN}', "lora_alpha takes a number"),
        ('{"transformer.lora_alpha": -Infinity}', "lora_alpha takes a number"),
        ('{"transformer.lora_alpha": 1e39}', "lora_alpha takes a number"),
        ('{"transformer.alpha_pattern": [1]}', "alpha_pattern takes a JSON object of layers"),
        ('{"transformer.alpha_pattern": 5}', "alpha_pattern takes a JSON object of layers"),
        ('{"transformer.alpha_pattern": {"to_q": NaN}}', "alpha_pattern 'to_q' takes a number"),
        ('{"transformer.alpha_pattern": {"(a|a)*!": 2}}', r"alpha_pattern takes names of layers, got '\(a\|a\)\*!'"),
        ('{"transformer.rank_pattern": {"(a|a)*!": 2}}', "rank_pattern takes names of layers"),
        ('{"transformer.target_modules": "(a|a)*!"}', "target_modules takes names of layers"),
        ('{"transformer.use_rslora": "no"}', "use_rslora takes true or false"),
    ],
)
def test_settings_that_are_none_are_refused(qwen: Case, tmp_path: Path, settings: str, words: str) -> None:
    save_file(GOOD, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(AdapterFileError, match=words):
        qwen.read(tmp_path / "a.safetensors")
    if "transformer." not in settings:
        save_file(GOOD, tmp_path / PEFT_FILE)
        (tmp_path / PEFT_CONFIG).write_text(settings)
        with pytest.raises(AdapterFileError, match=words.replace("lora_adapter_metadata", "adapter_config.json")):
            qwen.read(tmp_path / PEFT_FILE)


def test_values_that_become_infinite_are_refused(qwen: Case, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    large = {f"{Q}.lora_B.weight": torch.full((32, 2), 3e38)}
    save_file(GOOD | large, file)
    qwen.read(file)
    with pytest.raises(AdapterFileError, match=r"lora_B.weight .* infinite values in torch.float16"):
        qwen.reader(dtype=torch.float16).read(AdapterPaths.at(file))
    save_file(GOOD | large | {f"{Q}.alpha": torch.tensor(16)}, file)
    with pytest.raises(AdapterFileError, match=r"lora_B.weight with its scale 8 holds infinite values"):
        qwen.read(file)
    with pytest.raises(AdapterFileError, match=r"lora_B.weight times its scale 8 holds infinite values"):
        AdapterFile.read(AdapterPaths.at(file)).with_scales_in_weights()


def test_an_adapter_of_another_model_is_refused_with_names_of_both(qwen: Case, tmp_path: Path) -> None:
    other = Case("wan").pairs(part="blocks.")
    with pytest.raises(
        AdapterFileError, match=r"no layer here .*; it has transformer\..* and \d+ more, the model trans"
    ):
        qwen.read(save_peft(other, tmp_path / "wan.safetensors"))


@pytest.mark.parametrize("writes", [save_peft, save_kohya])
def test_a_generic_layer_alone_makes_no_adapter_of_this_model(
    case: Case, tmp_path: Path, writes: Callable[..., Path]
) -> None:
    """Qwen-Image and Wan both have a `proj_out` outside of their blocks, for example."""
    for other in FAMILIES.keys() - {case.family}:
        shares = {case.family, other} == {"qwen_image", "wan"}
        words = "the model has none of its layers inside blocks; it has .*proj_out" if shares else "no layer here"
        with pytest.raises(AdapterFileError, match=f"^{words}"):
            case.read(writes(Case(other).pairs(), tmp_path / f"{other}.safetensors"))


def test_layers_that_the_model_lacks_are_left_out_with_a_warning(
    qwen: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = qwen.pairs(part="attn.to_q")
    wanted = deltas(qwen.read(save_peft(pairs, tmp_path / "a.safetensors")))
    assert not caplog.records
    more = pairs | {"transformer_blocks.9.attn.to_q": random_pairs(qwen.theirs, 2)["img_in"]}
    with caplog.at_level(logging.WARNING):
        assert_same(qwen.read(save_peft(more, tmp_path / "b.safetensors")), wanted)
    (record,) = caplog.records
    assert (
        "1 of its 3 layers are not in this model and left out: transformer.transformer_blocks.9" in record.getMessage()
    )


def test_files_that_are_none_are_refused_before_they_are_read(qwen: Case, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for contents in (b"", b"nothing", (10 * 2**30).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(contents)
        with pytest.raises(AdapterFileError):
            qwen.read(file)
    save_file({}, file)
    with pytest.raises(AdapterFileError, match="it holds no weights"):
        qwen.read(file)
    save_file(GOOD, file)
    with file.open("r+b") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(AdapterFileError, match=f"at most {MAX_FILE_BYTES} bytes, got {MAX_FILE_BYTES + 1}"):
        qwen.read(file)


def save_raw(file: Path, tensors: Mapping[str, tuple[str, list[int], list[int]]], num_bytes: int) -> Path:
    """A file with this header and as many zero bytes. tensors: key -> type, shape, offsets."""
    names = ("dtype", "shape", "data_offsets")
    header = json.dumps({key: dict(zip(names, tensor)) for key, tensor in tensors.items()}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    return file


@pytest.mark.parametrize(
    ("first", "second", "num_bytes", "words"),
    [
        (("F32", [4], [0, 16]), ("F32", [4], [8, 24]), 24, "invalid offset"),
        (("F32", [4], [0, 16]), ("F32", [4], [20, 36]), 36, "invalid offset"),
        (("F32", [4], [0, 16]), ("F32", [4], [2**40, 2**40 + 16]), 32, "invalid offset"),
        (("F32", [4], [0, 16]), ("F32", [4], [16, 32]), 31, "file not fully covered"),
        (("F32", [4], [0, 16]), ("F32", [4], [16, 32]), 33, "file not fully covered"),
        (("F32", [4], [0, 16]), ("F32", [-4], [16, 32]), 32, "invalid value: integer `-4`"),
        (("F32", [4], [0, 16]), ("F32", [4], [-16, 0]), 16, "invalid value: integer `-16`"),
        (("F32", [4], [0, 16]), ("F32", [5], [16, 32]), 32, "invalid shape, data type, or offset"),
        (("F32", [4], [0, 16]), ("F32", [2**62, 4], [16, 32]), 32, "overflow"),
        (("F32", [4], [0, 16]), ("U16", [8], [16, 32]), 32, "b takes the types F64, .*, got U16"),
        (("F32", [4], [0, 16]), ("F32", [0, 2**63], [16, 16]), 16, "b takes at most 8 dimensions and .* values"),
        (("F32", [4], [0, 16]), ("F32", [1] * 99, [16, 20]), 20, "b takes at most 8 dimensions .*got 99 dimensions"),
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(
    qwen: Case, tmp_path: Path, first: Any, second: Any, num_bytes: int, words: str
) -> None:
    file = save_raw(tmp_path / "a.safetensors", {"a": first, "b": second}, num_bytes)
    with pytest.raises(AdapterFileError, match=f"(?i){words}"):
        qwen.read(file)


def test_a_large_header_is_refused_before_it_is_read(qwen: Case, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterFileError, match=f"at most {MAX_HEADER_BYTES} bytes, got {MAX_HEADER_BYTES + 1}"):
        qwen.read(file)


@pytest.mark.parametrize(
    ("key", "weight", "words"),
    [
        (f"{Q}.lora_B.weight", torch.ones(33, 2), "has 32 inputs and 32 outputs, its weights are"),
        (f"{Q}.lora_B.weight", torch.ones(32, 3), "do not fit together"),
        (f"{Q}.lora_B.weight", torch.ones(32, 2, dtype=torch.int16), "got int16"),
        ("transformer.img_in.lora_A.weight", torch.ones(2, 16), "has no partner"),
    ],
)
def test_shapes_and_types_are_checked_before_a_weight_is_read(
    qwen: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, weight: Tensor, words: str
) -> None:
    def fail(file: Path, header: TensorHeader) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(adapter_file_module, "read_tensors", fail)
    save_file(GOOD | {key: weight}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=words):
        qwen.read(tmp_path / "a.safetensors")


def test_a_file_that_is_cut_after_its_header_was_read_is_refused(qwen: Case, tmp_path: Path) -> None:
    save_file(GOOD, file := tmp_path / "a.safetensors")

    def cut(_: AdapterFile) -> None:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1)

    with pytest.raises(AdapterFileError, match=r"the file ends after .* it was cut meanwhile"):
        AdapterFile.read(AdapterPaths.at(file), cut)
