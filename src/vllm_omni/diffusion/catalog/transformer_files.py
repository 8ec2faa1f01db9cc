"""Single files with the weights of a transformer: their headers, and what else they hold. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_omni.diffusion.catalog.gguf_header import read_gguf_header
from vllm_omni.diffusion.catalog.weight_files import StoredWeight, check_types, path_header
from vllm_omni.errors import ConfigError

GGUF = ".gguf"
SUFFIXES = (".safetensors", GGUF)
"""Suffixes of the files that are read."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""Starts that all names of a transformer's weights may have in a file."""
COMPANIONS = (
    "first_stage_model.",
    "vae.",
    "text_encoders.",
    "text_encoder.",
    "cond_stage_model.",
    "conditioner.",
    "clip.",
)
"""Starts of the names of other components' weights, which whole checkpoints hold and nobody reads."""
MARKERS = ("scaled_fp8", "__index_timestep_zero__")
"""Ends of the names of tensors by which ComfyUI marks a file; they hold no weights."""
_ADAPTER_WORDS = (".lora_", "lora_down", "lora_up", "lokr_", "hada_w", ".diff_b")
_TEXT_ENCODER_ENDS = ("embed_tokens.weight", "token_embedding.weight", "shared.weight")
_VAE_NAMES = ("decoder.conv_in.weight", "decoder.conv1.weight")
_OTHER_KINDS = {
    "the weights of a text encoder": _TEXT_ENCODER_ENDS,
    "the weights of a VAE": _VAE_NAMES,
    "the weights of an image encoder": ("class_embedding",),
}
"""Content of other files -> ends of names that such files have, and no transformer's file."""


@dataclass(frozen=True)
class TransformerFile:
    """Header of a file with a transformer's weights."""

    path: Path
    flag: str
    """Flag that names the file, for errors."""
    prefix: str
    """Start of the names in the file."""
    weights: Mapping[str, StoredWeight]
    """Weights of the transformer, and their scales, by name without `prefix`."""

    @property
    def is_gguf(self) -> bool:
        return is_gguf(self.path)


def is_gguf(file: str | Path) -> bool:
    """Whether `file` is a GGUF file by its name."""
    return Path(file).suffix.lower() == GGUF


def read_transformer_file(file: str, flag: str) -> TransformerFile:
    """Read the header of `file`, a path, which may be a link. flag: the flag that names it.

    Raises ConfigError for a file that is missing or broken, or that holds something else than a transformer.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{flag} takes a file that exists, got {file}")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{flag} takes a file named *{' or *'.join(SUFFIXES)}, got {file}")
    stored = _gguf_weights(path, file) if is_gguf(path) else path_header(path, file)
    header = {name: weight for name, weight in stored.items() if not name.endswith(MARKERS)}
    prefix = next((start for start in PREFIXES if any(name.startswith(start) for name in header)), "")
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in header.items()
        if name.startswith(prefix) and not name.startswith(COMPANIONS)
    }
    if (content := _other_content(weights or header)) is not None:
        raise ConfigError(f"{flag} takes a file with the weights of a transformer, got {file}, {content}")
    for name in header:
        if not name.startswith((prefix, *COMPANIONS)):
            raise ConfigError(
                f"{file} has a weight outside of its transformer, whose names begin with {prefix}: {name}"
            )
    if not is_gguf(path):  # whose types are checked when the header is read
        check_types(file, weights)
    return TransformerFile(path, flag, prefix, weights)


def _gguf_weights(path: Path, name: str) -> dict[str, StoredWeight]:
    tensors = read_gguf_header(path).tensors
    return {key: StoredWeight(name, tensor.type.name, tensor.shape) for key, tensor in tensors.items()}


def _other_content(names: Collection[str]) -> str | None:
    """Content of a file with these names, for an error; None: it may be a transformer."""
    if not names:
        return "which holds no weights"
    for name in names:
        if any(word in name for word in _ADAPTER_WORDS):
            return f"a LoRA adapter (it has {name}): --lora-modules takes it"
    for content, ends in _OTHER_KINDS.items():
        if (found := next((name for name in names if name.endswith(ends)), None)) is not None:
            return f"which holds {content} (it has {found})"
    return None
