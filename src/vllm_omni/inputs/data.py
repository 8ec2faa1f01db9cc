"""Prompts and sampling parameters as the caller gives them. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.foreign.class_decorators import convert_keywords, explain_attributes
from vllm_omni.foreign.module_names import refuse_names
from vllm_omni.inputs.field_values import shown
from vllm_omni.inputs.foreign_params import NO_FIELDS, convert_adapter, convert_params


@convert_keywords(convert_adapter, InvalidRequestError)
@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter for one request: by the name that it was given at start, or by its path.

    `path`: a safetensors file, or a folder with one. `OmniDiffusionSamplingParams.lora_scale` overrides `scale`.
    vLLM's order of arguments, with a number between name and path, is accepted too.
    """

    name: str
    path: str | os.PathLike[str] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.path, int):
            if not isinstance(self.scale, str | os.PathLike):
                raise InvalidRequestError(
                    f"lora_request takes name, path and scale, got {shown(self.path)} as the path; vLLM's order is "
                    "name, number, path",
                    param="lora_request",
                )
            object.__setattr__(self, "path", self.scale)
            object.__setattr__(self, "scale", 1.0)
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))


def own_adapter(value: Any) -> Any:
    """`LoRARequest` for one of vLLM (`vllm.lora.request`), which is known by its attributes; others are unchanged."""
    if isinstance(value, LoRARequest) or not (hasattr(value, "lora_name") and hasattr(value, "lora_path")):
        return value
    return LoRARequest(value.lora_name, value.lora_path or None)


@explain_attributes(NO_FIELDS)
@convert_keywords(convert_params, InvalidRequestError)
@dataclass(frozen=True, slots=True)
class OmniDiffusionSamplingParams:
    """Parameters of one prompt's pictures or videos; `None` means the model's own default.

    Parameters of the public vllm-omni package are accepted if they mean the same (`generator`, `lora_requests`);
    others raise InvalidRequestError that says what to use here.
    """

    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    num_frames: int | None = None
    """Length of a video, in frames; 1: a picture."""
    seconds: float | None = None
    """Length of a video from its first frame to its last one, in place of `num_frames`."""
    fps: int | None = None
    """Frames a second of a video, by which `seconds` are counted. Some models also read it."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Classifier-free guidance of Z-Image (above 0) and of Wan (above 1); it doubles the work."""
    guidance_scale_2: float | None = None
    """`guidance_scale` of the steps that a model's second transformer computes (Wan 2.2); None: the same."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance of Qwen-Image; above 1 and with a negative prompt it doubles the work."""
    cfg_normalization: bool | float | None = None
    """Upper limit of the guided velocity's norm, relative to the conditional one's; True: 1; 0: no limit (Z-Image)."""
    cfg_truncation: float | None = None
    """Fraction of the schedule's time after which guidance ends (Z-Image)."""
    seed: int | None = None
    """Output i uses `seed + i`; None: a random seed, which the output reports."""
    num_outputs_per_prompt: int = 1
    sigmas: Sequence[float] | None = None
    """Custom noise schedule: one value per step, descending, in (0, 1]."""
    flow_shift: float | None = None
    """Shift of the noise schedule towards its noisy end: sigma becomes shift * sigma / (1 + (shift - 1) * sigma).

    It replaces the model's own shift, also one by the size of the picture. `shift` is accepted as a name of it.
    """
    max_sequence_length: int | None = None
    """Most tokens of the prompt; a longer one is refused."""
    strength: float | None = None
    """Change of an edited picture from its input, in (0, 1]: the fraction of the steps that is computed."""
    lora_request: LoRARequest | Sequence[LoRARequest] | None = None
    """Adapter, or several, whose changes add up."""
    lora_scale: float | Sequence[float] | None = None
    """Factor of the adapter's changes, in place of its own `scale`; for a list of adapters a list of factors."""
    cache: bool | None = None
    """False: compute every block even if the server has a step cache. True: refused if it has none."""
    priority: int = 0
    """Smaller values run earlier."""
    output_type: str = "pil"
    num_previews: int = 0
    """Previews to deliver while the request runs (0-3)."""

    def __post_init__(self) -> None:
        given: Any = self.lora_request
        own = type(given)(map(own_adapter, given)) if type(given) in (list, tuple) else own_adapter(given)
        object.__setattr__(self, "lora_request", own)

    def filled_from(self, defaults: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
        """Copy in which each `None` is replaced by the value of the same name in `defaults`."""
        known = {f.name for f in fields(self)}
        missing = {k: v for k, v in defaults.items() if k in known and getattr(self, k) is None}
        return replace(self, **missing)


PARAMETERS = tuple(f.name for f in fields(OmniDiffusionSamplingParams))


@dataclass(frozen=True, slots=True)
class OmniPrompt:
    """One prompt: its text, its negative text and the pictures to edit.

    `images`: one PIL image or `InputImage`, or a sequence or iterator of them. Raises InvalidRequestError for a path
    or bytes.
    """

    prompt: str
    negative_prompt: str | None = None
    images: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _listed_images(self.images))


PromptLike = str | Mapping[str, Any] | OmniPrompt

_PROMPT_KEYS = ("prompt", "negative_prompt", "multi_modal_data")
_MODALITIES = "modalities"


def parse_prompt(value: PromptLike) -> OmniPrompt:
    """`OmniPrompt` of a string or of `{"prompt", "negative_prompt", "multi_modal_data": {"image": ...}}`.

    The mapping may also have `modalities`, as scripts of the public vllm-omni package do. Raises InvalidRequestError,
    with the key, for anything else.
    """
    if isinstance(value, OmniPrompt):
        return value
    if isinstance(value, str):
        return OmniPrompt(value)
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"a prompt is a string or a mapping with {_PROMPT_KEYS}, got {type(value).__name__}",
            param="prompt",
        )
    check_modalities(value.get(_MODALITIES), _MODALITIES)
    if unknown := set(value) - {*_PROMPT_KEYS, _MODALITIES}:
        raise InvalidRequestError(
            f"unknown prompt keys {sorted(map(str, unknown))}, accepted are {_PROMPT_KEYS}", param="prompt"
        )
    prompt, negative = value.get("prompt"), value.get("negative_prompt")
    if not isinstance(prompt, str):
        raise InvalidRequestError(f"prompt must be a string, got {type(prompt).__name__}", param="prompt")
    if negative is not None and not isinstance(negative, str):
        raise InvalidRequestError(
            f"negative_prompt must be a string, got {type(negative).__name__}", param="negative_prompt"
        )
    return OmniPrompt(prompt, negative, _parse_images(value.get("multi_modal_data")))


def check_modalities(modalities: Any, name: str) -> None:
    """Raise InvalidRequestError unless `modalities` is None, empty, or asks for images only."""
    asked = [modalities] if isinstance(modalities, str) else modalities
    if asked is None or (isinstance(asked, list | tuple) and all(isinstance(m, str) and m == "image" for m in asked)):
        return
    raise InvalidRequestError(
        f'{name} takes ["image"], or leave it out: a model makes what it was made for, got {shown(modalities)}',
        param=name,
    )


def _parse_images(data: Any) -> Any:
    if data is None:
        return ()
    if not isinstance(data, Mapping) or set(data) - {"image"}:
        raise InvalidRequestError(
            'multi_modal_data must be {"image": PIL image or list of them}', param="multi_modal_data"
        )
    return data.get("image")


def _listed_images(images: Any) -> tuple[Any, ...]:
    """Tuple of one or several images. Raises InvalidRequestError for a path or bytes."""
    if images is None:
        return ()
    # Not Iterable: an array is iterable, but is one picture. A string is a sequence of strings.
    is_list = isinstance(images, Sequence | Iterator) and not isinstance(images, str | bytes | bytearray)
    listed = tuple(images) if is_list else (images,)
    for image in listed:
        if isinstance(image, str | bytes | bytearray | os.PathLike):
            got = type(image).__name__ if isinstance(image, bytes | bytearray) else shown(image)
            raise InvalidRequestError(
                "image takes PIL images: open it first, with PIL.Image.open(path) or "
                f"PIL.Image.open(io.BytesIO(data)), got {got}",
                param="image",
            )
    return listed


_MAPPING = 'a prompt is a string or a mapping with "prompt", "negative_prompt" and "multi_modal_data"'
if not TYPE_CHECKING:  # type checkers know our names alone
    __getattr__ = refuse_names(
        __name__,
        {
            **dict.fromkeys(
                ("OmniTextPrompt", "OmniTokensPrompt", "OmniEmbedsPrompt", "OmniCustomPrompt", "OmniSingletonPrompt"),
                _MAPPING,
            ),
            "OmniPromptType": "here PromptLike",
            "OmniSamplingParams": "here OmniDiffusionSamplingParams",
        },
    )
