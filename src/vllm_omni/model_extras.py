"""Extras of single models, under the import path of the public vllm-omni package: no model here has any.

All parameters are fields of `OmniDiffusionSamplingParams`, and prompts have the same form for all models. So the class
name of a model is never needed: it is None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_omni.foreign.module_names import refuse_names


def get_model_class_name(omni: object) -> None:
    return None


def get_extra_body_params(model_class_name: str | None) -> frozenset[str]:
    """Names of model parameters that are not fields of `OmniDiffusionSamplingParams`: none."""
    return frozenset()


def get_extra_output_params(model_class_name: str | None) -> frozenset[str]:
    """Names of further outputs of a model: none."""
    return frozenset()


def get_ar_input_builder(model_class_name: str | None) -> None:
    """Builder of inputs for a language model that is a stage of its own: there is none."""
    return None


def get_ar_tokenizer_validator(model_class_name: str | None) -> None:
    """Check of the tokenizer of a language model that is a stage of its own: there is none."""
    return None


def should_init_extra_args_for_non_diffusion_stages(model_class_name: str | None) -> bool:
    return False


def build_text_to_image_prompt(
    model_class_name: str | None, prompt: dict[str, Any], height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """The prompt that `Omni.generate` takes: `prompt` itself."""
    return prompt


def build_image_to_image_prompt(
    model_class_name: str | None,
    prompt: str,
    negative_prompt: str | None,
    input_image: Any,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """Mapping that `Omni.generate` takes as a prompt. `input_image`: one PIL image, or a list of them."""
    return {"prompt": prompt, "negative_prompt": negative_prompt, "multi_modal_data": {"image": input_image}}


if not TYPE_CHECKING:  # type checkers know our names alone
    __getattr__ = refuse_names(
        __name__, {}, "models have no extras here: give a prompt and OmniDiffusionSamplingParams to Omni.generate"
    )
