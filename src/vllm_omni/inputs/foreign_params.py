"""Sampling parameters and adapters in the form of the public vllm-omni package and of diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.foreign.class_decorators import has_no_effect
from vllm_omni.inputs.field_values import shown

PROMPT_FORM = 'it is part of the prompt: {"prompt": ..., "negative_prompt": ..., "multi_modal_data": {"image": ...}}'
IN_PROMPT = ("prompt", "negative_prompt", "image", "pil_image")
"""Names that belong to the prompt, not to the sampling parameters."""
_REPLACED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "boundary_ratio": ("a model is loaded as its folder says", ()),
    "cfg_normalize": ("here cfg_normalization", ()),
    "eta": ("the model's own noise scheduler is used", (0.0,)),
    "extra_args": ("parameters have fields of their own here, and no model takes others", ()),
    "frame_rate": ("here fps", ()),
    "guidance_rescale": ("guidance is not rescaled", (0.0,)),
    "latents": ("noise is drawn from the seed", ()),
    "layers": ("a picture has one layer", (4,)),
    "num_images_per_prompt": ("here num_outputs_per_prompt", ()),
    "num_videos_per_prompt": ("here num_outputs_per_prompt", ()),
    "resolution": ("here height and width", (640,)),
    "return_trajectory_decoded": ("here num_previews, with AsyncOmni", ()),
    "return_trajectory_latents": ("latents stay in the worker", ()),
    "size": ("here height and width", ()),
    "timesteps": ("here sigmas", ()),
    **dict.fromkeys(IN_PROMPT, (PROMPT_FORM, ())),
}
"""Name -> what to use here or why there is nothing, and the values that are ignored because they ask for nothing: the
public package's defaults, which its examples give."""
ALIASES = {"shift": "flow_shift"}
"""Further name of a field -> the field. `shift` is its name in the configs of most noise schedulers."""
_TAKEN = ("generator", "lora_requests", "lora_scales")
FOREIGN_PARAMS = (*_REPLACED, *_TAKEN, *ALIASES)
"""Names of other packages that `OmniDiffusionSamplingParams` accepts or refuses with an explanation."""
NO_FIELDS = {name: text for name, (text, _) in _REPLACED.items()}
"""Attributes that only other packages' parameters have -> what to use here, or why there is nothing."""


def convert_params(keywords: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Fields of `OmniDiffusionSamplingParams` (`names`) from keywords of ours and of other packages.

    Raises InvalidRequestError.
    """
    keywords = without_aliases(keywords)
    ours = {name: value for name, value in keywords.items() if name in names}
    for name, value in keywords.items():
        if name in names or name in _TAKEN:
            continue
        if name not in _REPLACED:
            raise InvalidRequestError(f"unknown parameter {name!r}; accepted are {', '.join(names)}", param=name)
        text, harmless = _REPLACED[name]
        is_empty = name == "extra_args" and isinstance(value, dict) and all(map(has_no_effect, value.values()))
        if not (has_no_effect(value) or is_empty or _is_in(value, harmless)):
            raise InvalidRequestError(f"{name}: {text}, got {shown(value)}", param=name)
    if (generator := keywords.get("generator")) is not None:
        _put(ours, "seed", seed_of(generator), "generator")
    for name, ours_name in (("lora_requests", "lora_request"), ("lora_scales", "lora_scale")):
        if not has_no_effect(values := keywords.get(name)):
            _put(ours, ours_name, _one_or_several(name, values), name)
    return ours


def without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the names of our fields. Raises InvalidRequestError if a field and its alias differ."""
    ours = {name: value for name, value in values.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if (value := values.get(alias)) is not None:
            _put(ours, name, value, alias)
    return ours


def _is_in(value: Any, harmless: tuple[Any, ...]) -> bool:
    # Not for arrays: they compare item by item, and the result has no truth value.
    return isinstance(value, Real | str) and value in harmless


def _put(ours: dict[str, Any], name: str, value: Any, given_as: str) -> None:
    if ours.get(name) is not None and not _are_equal(ours[name], value):
        raise InvalidRequestError(
            f"{given_as} and {name} differ: got {shown(value)} and {shown(ours[name])}", param=name
        )
    ours[name] = value


def _are_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # the comparison of arrays has no truth value
        return False


def _one_or_several(name: str, values: Any) -> Any:
    if not isinstance(values, list | tuple):
        raise InvalidRequestError(f"{name} takes a list, got {shown(values)}", param=name)
    return values[0] if len(values) == 1 else tuple(values)


def seed_of(generator: Any) -> int:
    """The seed of a `torch.Generator` that has drawn nothing yet. Raises InvalidRequestError for other objects.

    Noise is drawn from this seed on the CPU, whatever the generator's device; the generator does not change.
    """
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    # Recognized by its methods: this module does not import PyTorch.
    if not hasattr(generator, "initial_seed") or not hasattr(generator, "get_state"):
        raise InvalidRequestError(
            f"generator takes one torch.Generator (output i uses its seed + i), got {type(generator).__name__}",
            param="generator",
        )
    seed = int(generator.initial_seed())
    fresh = type(generator)(device=generator.device).manual_seed(seed)
    if not bool((fresh.get_state() == generator.get_state()).all()):
        raise InvalidRequestError(
            f"generator has drawn numbers since its seed was set: give seed={seed}, or another one", param="generator"
        )
    return seed


def convert_adapter(keywords: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Fields of `LoRARequest` (`names`) for vLLM's `lora_name`, `lora_path`, `lora_int_id`. Raises InvalidRequestError.

    The number has no meaning here, because adapters are identified by name and path. It is dropped, also if it is the
    second positional argument, as in vLLM.
    """
    ours = {name: value for name, value in keywords.items() if name in names}
    if "lora_path" in keywords and isinstance(ours.get("path"), int):
        del ours["path"]
    for name, value in keywords.items():
        if name in ("lora_name", "lora_path"):
            _put(ours, name.removeprefix("lora_"), value, name)
        elif name not in names and name != "lora_int_id":
            raise InvalidRequestError(f"lora_request: unknown {name!r}; accepted are {', '.join(names)}", param=name)
    return ours
