"""Broken model folders: each is refused in one line, by the front end, before a worker loads."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer, ByT5Tokenizer, CLIPTokenizer, LlamaTokenizer, T5Tokenizer

from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_models import SMALL
from testbed.tiny_z_image import build_tiny_z_image
from tests.broken_folders import (
    PAGE,
    POINTER,
    Breakage,
    both,
    cut,
    folder_instead,
    linked_outside,
    linked_to,
    moved,
    outside_of,
    removed,
    section,
    sharded,
    text,
    values,
    weights,
)
from vllm_omni.diffusion.catalog.tokenizer_files import check_tokenizer
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.errors import ConfigError
from vllm_omni.omni import AsyncOmni

INDEX = "model_index.json"
TRANSFORMER, DENOISER = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
ENCODER, LANGUAGE = "text_encoder/config.json", "text_encoder/model.safetensors"
VAE, AUTOENCODER = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER, SETTINGS = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
STEM = "diffusion_pytorch_model"
SHARD = f"{STEM}-00002-of-00002.safetensors"
WEIGHT = "transformer_blocks.1.attn.to_q.weight"
EMBEDDING = "model.embed_tokens.weight"
BILLION = 10**9

BROKEN: dict[str, tuple[Breakage, str]] = {
    # model_index.json
    "index is a list": (text(INDEX, "[]"), f"cannot read {INDEX}: it must hold a JSON object, got []"),
    "index is empty": (text(INDEX, ""), f"cannot read {INDEX}: no valid JSON"),
    "index in Latin-1": (lambda folder: (folder / INDEX).write_bytes(b'{"\xe9": 1}'), f"cannot read {INDEX}: no valid"),
    "index nests too deep": (text(INDEX, "[" * 100_000), f"cannot read {INDEX}: no valid JSON"),
    "index is a pointer": (text(INDEX, POINTER), f"cannot read {INDEX}: it is a Git LFS pointer"),
    "index links outside": (linked_outside(INDEX), f"cannot read {INDEX}: it is a link to "),
    "entry of one": (values(INDEX, vae=["diffusers"]), f"{INDEX}: vae must be a list of a library and a class"),
    "entry elsewhere": (values(INDEX, **{"../x": ["a", "B"]}), f"{INDEX} names '../x', which is not a folder"),
    "no component": (lambda folder: shutil.rmtree(folder / "vae"), "cannot read vae/config.json: No such file"),
    "further component": (values(INDEX, extra=["a", "Model"]), f"{INDEX} names extra, but the model has no folder"),
    # configs
    "config is null": (text(VAE, "null"), f"cannot read {VAE}: it must hold a JSON object, got None"),
    "config is a folder": (folder_instead(ENCODER), f"cannot read {ENCODER}: it is a folder"),
    "config links to nothing": (linked_to(VAE, "gone.json"), f"cannot read {VAE}: it is a link to "),
    "config links to itself": (linked_to(VAE, "config.json"), f"cannot read {VAE}: its links lead nowhere"),
    "config is missing": (removed(SCHEDULER), f"cannot read {SCHEDULER}: No such file or directory"),
    "config is a page": (text(TRANSFORMER, PAGE), f"cannot read {TRANSFORMER}: no valid JSON"),
    "config is a pipe": (
        both(removed(VAE), lambda folder: os.mkfifo(folder / VAE)),
        f"cannot read {VAE}: it is no regular file",
    ),
    "a billion layers": (
        values(TRANSFORMER, num_layers=BILLION),
        f"{TRANSFORMER}: num_layers takes a whole number from 1 to 10000, got {BILLION}",
    ),
    "more layers than stored": (
        values(TRANSFORMER, num_layers=3),
        f"{TRANSFORMER}: num_layers is 3, but the weight files have 2 transformer_blocks",
    ),
    "a billion heads": (values(TRANSFORMER, num_attention_heads=BILLION), f"{TRANSFORMER}: num_attention_heads takes"),
    "other heads": (values(TRANSFORMER, num_attention_heads=4), f"{DENOISER}: "),
    "negative width": (
        values(TRANSFORMER, joint_attention_dim=-1),
        f"{TRANSFORMER}: joint_attention_dim takes a whole",
    ),
    "width in words": (values(TRANSFORMER, in_channels="64"), f"{TRANSFORMER}: in_channels takes a whole number"),
    "width is null": (values(TRANSFORMER, out_channels=None), f"{TRANSFORMER}: out_channels takes a whole number"),
    "layers are true": (values(TRANSFORMER, num_layers=True), f"{TRANSFORMER}: num_layers takes a whole number"),
    "axes are a number": (values(TRANSFORMER, axes_dims_rope=16), f"{TRANSFORMER}: axes_dims_rope takes a list"),
    "a billion encoder layers": (
        section(ENCODER, "text_config", num_hidden_layers=BILLION),
        f"{ENCODER}: num_hidden_layers takes a whole number from 1 to 10000, got {BILLION}",
    ),
    "other encoder width": (section(ENCODER, "text_config", intermediate_size=128), f"{LANGUAGE}: model.layers.0.mlp."),
    "heads do not divide": (section(ENCODER, "text_config", num_attention_heads=3), f"{ENCODER}: hidden_size 32 and"),
    "text_config is a list": (values(ENCODER, text_config=[1]), f"{ENCODER}: text_config takes a JSON object"),
    "a billion VAE blocks": (values(VAE, num_res_blocks=BILLION), f"{VAE}: num_res_blocks takes a whole number from 1"),
    "other VAE width": (values(VAE, base_dim=16), f"{AUTOENCODER}: "),
    "no numbers for latents": (
        values(VAE, latents_mean=[0.5]),
        f"{VAE}: latents_mean takes a number for each of the 16",
    ),
    "latents in words": (values(VAE, latents_std=["1"] * 16), f"{VAE}: latents_std takes a number, got '1'"),
    "shift in words": (values(SCHEDULER, shift="3"), f"{SCHEDULER}: shift takes a number, got '3'"),
    "no training steps": (values(SCHEDULER, num_train_timesteps=0), f"{SCHEDULER}: num_train_timesteps takes a whole"),
    "other shift type": (values(SCHEDULER, time_shift_type="cubic"), f"{SCHEDULER}: time_shift_type takes exponential"),
    "defaults link outside": (
        linked_outside("default_sampling_params.json"),
        "cannot read default_sampling_params.json: it is a link to ",
    ),
    # tokenizer
    "no vocabulary": (removed(TOKENIZER), "tokenizer/ has no vocabulary of a Qwen2Tokenizer: neither tokenizer.json"),
    "tokenizer is no JSON": (text(TOKENIZER, "{"), f"cannot read {TOKENIZER}: no valid JSON"),
    "tokenizer without model": (text(TOKENIZER, "{}"), f"cannot read {TOKENIZER}: it is no tokenizer: Model missing"),
    "tokenizer is empty": (text(TOKENIZER, ""), f"cannot read {TOKENIZER}: it is empty"),
    "tokenizer is a pointer": (text(TOKENIZER, POINTER), f"cannot read {TOKENIZER}: it is a Git LFS pointer"),
    "tokenizer is truncated": (cut(TOKENIZER, 1000), f"cannot read {TOKENIZER}: no valid JSON"),
    "settings are a list": (text(SETTINGS, "[]"), f"cannot read {SETTINGS}: it must hold a JSON object"),
    "length in words": (values(SETTINGS, model_max_length="long"), f"{SETTINGS}: model_max_length takes a number"),
    "class is a number": (values(SETTINGS, tokenizer_class=5), f"{SETTINGS}: tokenizer_class takes a text, got 5"),
    "added tokens are a list": (
        values(SETTINGS, added_tokens_decoder=[1]),
        f"{SETTINGS}: added_tokens_decoder takes a JSON object, got [1]",
    ),
    "special tokens are a list": (
        text("tokenizer/special_tokens_map.json", "[]"),
        "cannot read tokenizer/special_tokens_map.json: it must hold a JSON object",
    ),
    "vocabulary without merges": (moved(TOKENIZER, "tokenizer/vocab.json"), "tokenizer/ lacks merges.txt"),
    "vocabulary of words": (
        both(removed(TOKENIZER), text("tokenizer/vocab.json", '{"a": "b"}'), text("tokenizer/merges.txt", "a b\n")),
        "cannot read tokenizer/vocab.json: it must map tokens to numbers",
    ),
    "merges of others": (
        both(removed(TOKENIZER), text("tokenizer/vocab.json", '{"a": 0}'), text("tokenizer/merges.txt", "a q\n")),
        "cannot read tokenizer/merges.txt with vocab.json: Error while initializing BPE: Token `q` out of vocabulary",
    ),
    "tokenizer of another model": (
        both(removed(TOKENIZER), text("tokenizer/vocab.json", '{"a": 0}'), text("tokenizer/merges.txt", "#version\n")),
        "tokenizer/ lacks the token '<|im_start|>'",
    ),
    "tokenizer of a larger model": (
        both(
            section(ENCODER, "text_config", vocab_size=400),
            weights(LANGUAGE, lambda w: w.update({EMBEDDING: w[EMBEDDING][:400]})),
        ),
        "; the text encoder's vocab_size allows 0 to 399",
    ),
    # weight files
    "weights are empty": (text(AUTOENCODER, ""), f"{AUTOENCODER} is no safetensors file: it has 0 bytes"),
    "weights are a page": (text(DENOISER, PAGE), f"{DENOISER} is no safetensors file: it has "),
    "weights are a pointer": (text(LANGUAGE, POINTER), f"cannot read {LANGUAGE}: it is a Git LFS pointer"),
    "weights are truncated": (cut(DENOISER, -5), f"{DENOISER} is truncated: it has "),
    "header is truncated": (cut(LANGUAGE, 100), f"{LANGUAGE} is truncated: it has 100 bytes, its header alone needs"),
    "weights are a folder": (folder_instead(DENOISER), f"cannot read {DENOISER}: it is a folder"),
    "weights link to nothing": (
        linked_to(LANGUAGE, "/nowhere/x"),
        f"cannot read {LANGUAGE}: it is a link to /nowhere/",
    ),
    "weights link outside": (linked_outside(DENOISER), f"cannot read {DENOISER}: it is a link to "),
    "component links outside": (linked_outside("vae"), "cannot read vae/config.json: it is a link to "),
    "weights are missing": (removed(AUTOENCODER), "vae/ has no .safetensors file named"),
    "pickled weights": (
        moved(LANGUAGE, "text_encoder/pytorch_model.bin"),
        "text_encoder/ has no .safetensors file, but",
    ),
    "variant alone": (moved(AUTOENCODER, f"vae/{STEM}.fp16.safetensors"), "vae/ has weight files of the variants fp16"),
    "no weights inside": (weights(AUTOENCODER, dict.clear), "the weight files of vae/ hold no weights"),
    "missing weight": (
        weights(DENOISER, lambda w: w.pop(WEIGHT)),
        "transformer/ lacks 1 weights of the model, among ",
    ),
    "foreign weight": (
        weights(DENOISER, lambda w: w.update(surplus=np.zeros(1, np.float32))),
        f"{DENOISER} has a weight that the model does not take: surplus",
    ),
    "weight of another shape": (
        weights(DENOISER, lambda w: w.update({WEIGHT: np.zeros((48, 47), np.float32)})),
        f"{DENOISER}: {WEIGHT} has shape (48, 47), by config.json it is (48, 48)",
    ),
    "weight of another type": (
        weights(LANGUAGE, lambda w: w.update({"model.norm.weight": np.zeros(32, np.int8)})),
        f"{LANGUAGE}: model.norm.weight is stored as I8; weights are read from F64",
    ),
    "no embedding": (
        weights(LANGUAGE, lambda w: w.pop(EMBEDDING)),
        "text_encoder/ lacks the weight embed_tokens.weight",
    ),
    # shards
    "truncated shard": (
        both(sharded("transformer", STEM), cut(f"transformer/{SHARD}", -1)),
        f"transformer/{SHARD} is truncated: ",
    ),
    "missing shard": (
        both(sharded("transformer", STEM), removed(f"transformer/{SHARD}")),
        f"transformer/ lacks {SHARD}",
    ),
    "shard without a weight": (
        both(sharded("transformer", STEM), weights(f"transformer/{SHARD}", lambda w: w.pop(WEIGHT))),
        f"transformer/{SHARD} lacks {WEIGHT}, which {DENOISER}.index.json places in it",
    ),
    "shard without a layer": (
        both(
            sharded("transformer", STEM),
            weights(f"transformer/{SHARD}", lambda w: [w.pop(name) for name in list(w) if "blocks.1." in name]),
        ),
        f"transformer/{SHARD} lacks transformer_blocks.1.",
    ),
    "text encoder's shard without a weight": (
        both(
            sharded("text_encoder", "model"),
            weights("text_encoder/model-00001-of-00002.safetensors", lambda w: w.pop(EMBEDDING)),
        ),
        f"text_encoder/model-00001-of-00002.safetensors lacks {EMBEDDING}, which {LANGUAGE}.index.json places in it",
    ),
    "index without weight_map": (
        both(sharded("transformer", STEM), text(f"{DENOISER}.index.json", "{}")),
        f"{DENOISER}.index.json: weight_map must be",
    ),
    "index of an outside file": (
        sharded("transformer", STEM, lambda index: index.update({WEIGHT: "../../outside/x.safetensors"})),
        f"{DENOISER}.index.json names '../../outside/x.safetensors', which is not a file of the same folder",
    ),
}


class Opened(list[str]):
    """Paths that Python opens, noted from the interpreter's audit events while `is_on`."""

    is_on = False

    def __init__(self) -> None:
        super().__init__()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.is_on and event == "open":
            self.append(str(arguments[0]))


OPENED = Opened()


def refusal(folder: Path) -> str:
    """Error of the front end for the model in `folder`; no worker is started."""
    with pytest.raises(ConfigError) as caught:
        AsyncOmni(model=str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("breakage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_line_with_the_file_and_the_reason(
    breakage: Breakage, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    breakage(folder)
    OPENED.clear()
    OPENED.is_on = True
    try:
        message = refusal(folder)
    finally:
        OPENED.is_on = False
    assert words in message
    assert [path for path in OPENED if path.startswith(str(outside_of(folder)))] == []


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_z_image(tmp_path_factory.mktemp("models") / "z-image", default_sampling_params=SMALL)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (values(TRANSFORMER, n_layers=BILLION), f"{TRANSFORMER}: n_layers takes a whole number from 1 to 10000"),
        (values(TRANSFORMER, n_refiner_layers=3), "n_refiner_layers is 3, but the weight files have 2 noise_refiner"),
        (
            values(TRANSFORMER, cap_feat_dim=64),
            "cap_embedder.0.weight has shape (32,), by config.json it is (64,)",
        ),
        (values(TRANSFORMER, axes_lens=[]), f"{TRANSFORMER}: axes_lens takes a list that is not empty"),
        (values(TRANSFORMER, rope_theta="big"), f"{TRANSFORMER}: rope_theta takes a number, got 'big'"),
        (
            values(ENCODER, num_hidden_layers=4),
            f"{ENCODER}: num_hidden_layers is 4, but the weight files have 3 layers",
        ),
        (values(VAE, shift_factor=None), f"{VAE}: shift_factor takes a number, got None"),
        (values(VAE, block_out_channels=[8, 16, 16, 32]), "decoder.conv_in.weight has shape"),
        (values(VAE, layers_per_block=BILLION), f"{VAE}: layers_per_block takes a whole number from 1 to"),
        (removed("tokenizer/chat_template.jinja"), "tokenizer/ has no chat template"),
    ],
)
def test_a_broken_z_image_folder_too(breakage: Breakage, words: str, z_image: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(z_image, tmp_path / "model")
    breakage(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (section(ENCODER, "vision_config", depth=BILLION), "vision_config: depth takes a whole number from 1 to 10000"),
        (
            section(ENCODER, "vision_config", hidden_size=64),
            "visual.blocks.0.attn.proj.bias has shape (32,), by config.json",
        ),
        (values(ENCODER, vision_config=None), f"{ENCODER}: vision_config takes a JSON object, got None"),
        (removed("processor/preprocessor_config.json"), "processor/ lacks preprocessor_config.json"),
        (text("processor/preprocessor_config.json", "[]"), "cannot read processor/preprocessor_config.json: it must"),
        (
            weights(LANGUAGE, lambda w: w.pop("visual.blocks.0.attn.qkv.bias")),
            "lacks 1 weights of the model, among them",
        ),
    ],
)
def test_a_broken_editing_folder_too(breakage: Breakage, words: str, tiny_edit_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_edit_model, tmp_path / "model")
    breakage(folder)
    assert words in refusal(folder)


@pytest.fixture(scope="module")
def whole_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path_factory.mktemp("models") / "sd3")


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (text(INDEX, "[]"), f"cannot read {INDEX}: it must hold a JSON object, got []"),
        (text(TRANSFORMER, "null"), f"cannot read {TRANSFORMER}: it must hold a JSON object"),
        (values(TRANSFORMER, num_layers=BILLION), f"{TRANSFORMER}: num_layers is {BILLION}, but the weight files have"),
        (values(ENCODER, num_hidden_layers=BILLION), f"{ENCODER}: num_hidden_layers is {BILLION}, but"),
        (values(VAE, layers_per_block=BILLION), f"{VAE}: layers_per_block is {BILLION}, but the weight files have"),
        (values(TRANSFORMER, patch_size="2"), f"{TRANSFORMER}: patch_size takes"),
        (values(TRANSFORMER, patch_size=0), f"{TRANSFORMER}: patch_size takes"),
        (values(TRANSFORMER, sample_size=[]), f"{TRANSFORMER}: sample_size takes"),
        (values(TRANSFORMER, pos_embed_max_size="x"), f"{TRANSFORMER}: pos_embed_max_size takes"),
        (values(VAE, latent_channels="16"), f"{VAE}: latent_channels takes"),
        (values(VAE, block_out_channels=4), f"{VAE}: block_out_channels takes"),
        (removed("scheduler/scheduler_config.json"), f"cannot read {SCHEDULER}: No such file"),
        (
            removed("tokenizer_3/tokenizer.json"),
            "tokenizer_3/ has no vocabulary of a T5Tokenizer: ",
        ),
        (text("tokenizer_2/tokenizer.json", PAGE), "cannot read tokenizer_2/tokenizer.json: no valid JSON"),
        (values("tokenizer_2/tokenizer_config.json", model_max_length=[]), "model_max_length takes a number from 1"),
        (
            values("tokenizer_2/tokenizer_config.json", model_max_length="77"),
            "tokenizer_2/tokenizer_config.json: model_max_length takes a number from 1, got '77'",
        ),
        (
            values(TRANSFORMER, patch_size=[0, 0]),
            f"{TRANSFORMER}: patch_size takes a whole number from 1 to 1048576, or",
        ),
        (values(INDEX, default_sample_size="1024"), f"{INDEX}: default_sample_size takes a whole number from 1 to"),
        (values(TRANSFORMER, sample_height="60"), f"{TRANSFORMER}: sample_height takes a whole number from 1 to"),
        (values(TRANSFORMER, target_size=[1]), f"{TRANSFORMER}: target_size takes a whole number from 1 to"),
        (
            both(removed("default_sampling_params.json"), values(TRANSFORMER, sample_size=17, patch_size=4)),
            "the model's own default, which follows from its configs: size ",
        ),
        (
            values(SCHEDULER, num_train_timesteps=BILLION),
            f"{SCHEDULER}: num_train_timesteps takes a whole number from 1",
        ),
        (
            moved("tokenizer/tokenizer.json", "tokenizer/x.model"),
            "tokenizer/ has no vocabulary of a CLIPTokenizer: neither tokenizer.json, nor vocab.json with merges.txt",
        ),
        (cut("text_encoder_2/model.safetensors", -1), "text_encoder_2/model.safetensors is truncated: "),
        (linked_outside(DENOISER), f"cannot read {DENOISER}: it is a link to "),
    ],
)
def test_a_broken_folder_of_a_whole_pipeline_too(
    breakage: Breakage, words: str, whole_pipeline: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole_pipeline, tmp_path / "model")
    breakage(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "settings", [{"tokenizer_class": None, "added_tokens_decoder": None, "model_max_length": None}, {"x": None}]
)
def test_null_in_a_tokenizers_settings_means_not_given(
    settings: dict[str, None], whole_pipeline: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole_pipeline, tmp_path / "model")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        values(f"{name}/tokenizer_config.json", **settings)(folder)
    AsyncOmni(model=str(folder))


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    check_tokenizer(tmp_path, "tokenizer", "ByT5Tokenizer")
    with pytest.raises(ConfigError, match="tokenizer/ has no vocabulary of a T5Tokenizer"):
        check_tokenizer(tmp_path, "tokenizer", "T5Tokenizer")


@pytest.mark.parametrize(
    ("cls", "file"), [(T5Tokenizer, "spiece.model"), (BertTokenizer, "vocab.txt"), (LlamaTokenizer, "tokenizer.model")]
)
def test_a_vocabulary_that_its_class_cannot_read_is_one_line(cls: type[Any], file: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / file).write_bytes(bytes(range(128, 256)) * 16)
    check_tokenizer(tmp_path, "tokenizer", cls.__name__)  # no library without torch reads these formats
    with pytest.raises(ConfigError, match=r"^tokenizer/: transformers cannot load the tokenizer: ") as caught:
        load_tokenizer(folder, cls)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ConfigError, match=r"^tokenizer/: "):
        load_tokenizer(tmp_path / "tokenizer", CLIPTokenizer)


def test_a_file_that_may_not_be_read_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refuse(path: Path, *args: Any, **keywords: Any) -> Any:
        if path.is_relative_to(tiny_model):
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **keywords)

    monkeypatch.setattr(Path, "open", refuse)  # modes do not stop the administrator, whom tests may run as
    assert refusal(tiny_model) == f"cannot read {INDEX}: Permission denied"


@pytest.mark.parametrize("value", ["64", 0, -64, 10**12, 1.5, None, [64], True])
@pytest.mark.parametrize("name", ["height", "num_inference_steps"])
def test_defaults_of_wrong_values_are_one_line(
    name: str, value: object, tiny_model: Path, tiny_edit_model: Path, tmp_path: Path
) -> None:
    for number, model in enumerate((tiny_model, tiny_edit_model)):
        folder = shutil.copytree(model, tmp_path / str(number))
        values("default_sampling_params.json", **{name: value})(folder)
        assert name in refusal(folder)


def test_a_good_folder_is_accepted_sharded_or_linked_inside(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    sharded("transformer", STEM)(folder)
    moved(VAE, "vae/real.json")(folder)
    (folder / VAE).symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    AsyncOmni(model=str(tmp_path / "link"))


def test_folders_linked_into_the_hubs_cache_are_accepted(tiny_model: Path, tmp_path: Path) -> None:
    """Folders of a revision consist of links to blobs. A link to nothing does no harm where nothing opens it."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cache = tmp_path / "cache" / "models--painter--tiny"
    (cache / "blobs").mkdir(parents=True)
    revision = cache / "snapshots" / ("a" * 40)
    for component in ("vae", "tokenizer"):
        shutil.copytree(folder / component, revision / component)
        shutil.rmtree(folder / component)
        (folder / component).symlink_to(revision / component)
        for file in list((revision / component).iterdir()):
            blob = file.rename(cache / "blobs" / f"{component}-{file.name}")
            file.symlink_to(blob)
    (folder / "transformer" / "README.md").symlink_to("gone.md")
    (folder / "transformer" / "circle").symlink_to(".")
    AsyncOmni(model=str(folder))
    (folder / "vae").unlink()
    (folder / "vae").symlink_to(shutil.copytree(revision / "vae", tmp_path / "vae"))
    assert refusal(folder).startswith("cannot read vae/config.json: it is a link to ")
