"""Keywords of the public vllm-omni package that are not ours: ignored, renamed or refused.

Most exist as flags too and are treated as the flag is.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.foreign.class_decorators import has_no_effect
from vllm_omni.foreign.diffusion_server_flags import VLLM_OMNI_FLAGS
from vllm_omni.foreign.flags import ForeignFlag, ignored, refused, renamed
from vllm_omni.foreign.vllm_flags import VLLM_FLAGS

logger = logging.getLogger(__name__)

_WITHOUT_FLAG = (
    *ignored("the model says what it makes", "--mode= --output-modalities=+"),
    *ignored("always done, or done in another way with the same pictures", "--enable-multithread-weight-load"),
    *ignored("sequences are never padded", "--mask-sp-padding"),
    *renamed("--usp and --ring", "--sequence-parallel-size=", "1"),
    *renamed("--max-num-seqs", "--diffusion-batch-size=", "1"),
    *renamed('default_sampling_params={"seed": ...}', "--seed="),
    *renamed("a config as the first argument, or its fields as keywords", "--od-config= --engine-args="),
    *refused(
        "one model is run, without stages: its settings are keywords",
        "--deploy-config= --stage-configs-path= --stage-configs= --stage-overrides= --strategy-config= --stage-id=",
        "0",
    ),
    *renamed("lora_modules={name: path}", "--lora-path=+"),
    *renamed("OmniDiffusionSamplingParams(lora_request=..., lora_scale=...)", "--lora-scale="),
    *renamed('quantization="fp8"', "--quantization-config= --diffusion-quantization-config="),
    *renamed("Python's logging", "--log-level= --log-file= --logging-config= --log-config-file=", "INFO", "info"),
    *refused(
        "it is a setting of a server, and none runs here",
        "--api-server-count= --grpc --grpc-port= --tokens-only --enable-scale-out --diffusion-streaming-output "
        "--video-output-transport= --h11-max-incomplete-event-size= --h11-max-header-count=",
        "1",
    ),
)
"""Keywords, written like flags. They override flags of the same name, whose text is for a command line."""

_SHORT_FLAGS = {"usp": "ulysses_degree", "ring": "ring_degree"}


def ignored_keywords(keywords: Mapping[str, Any], accepted: Collection[str]) -> list[str]:
    """Names of the keywords, none of them a setting of ours, that ask for something and are ignored.

    Raises ConfigError for a keyword that is renamed, refused or unknown; the message says what to use.
    """
    found = []
    for name, value in keywords.items():
        flag = flags_by_keyword().get(name)
        if flag is None:
            raise ConfigError(f"unknown keyword {name!r}; accepted are {', '.join(accepted)}")
        if has_no_effect(value):
            continue
        values = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
        if not flag.is_harmless([] if value is True else values):
            here = as_keywords(flag.text)
            raise ConfigError(f"{name}: here {here}" if flag.treatment == "renamed" else f"{name} {value!r}: {here}")
        found.append(name)
    return found


def log_ignored(keywords: Sequence[str]) -> None:
    """Log one line about ignored keywords."""
    if keywords:
        logger.warning("ignored, as the pictures are the same without: %s", ", ".join(keywords))


def convert_degrees(keywords: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Fields of `DiffusionParallelConfig` (`names`) from keywords of ours and of other packages. Raises ConfigError."""
    ours, others = _split(keywords, names)
    ignore_keywords(others, SimpleNamespace(**ours), names)
    return ours


def _split(keywords: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords among `names`, and the others."""
    ours = {name: value for name, value in keywords.items() if name in names}
    return ours, {name: value for name, value in keywords.items() if name not in names}


def ignore_keywords(others: dict[str, Any], parallel: Any, accepted: Collection[str]) -> None:
    """Ignore and log the keywords `others`; see `ignored_keywords`.

    `sequence_parallel_size` is accepted if it equals Ulysses degree x ring degree of `parallel`.
    """
    degrees = [getattr(parallel, name, None) for name in ("ulysses_degree", "ring_degree")]
    sequence = [1 if degree is None else degree for degree in degrees]
    if all(isinstance(d, int) for d in sequence) and others.get("sequence_parallel_size") == math.prod(sequence):
        del others["sequence_parallel_size"]
    log_ignored(ignored_keywords(others, accepted))


def convert_settings(keywords: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Fields of `OmniDiffusionConfig` (`names`) from keywords of ours and of other packages. Raises ConfigError.

    `parallel_config`, the keyword of `Omni`, is accepted for `parallel`.
    """
    ours, others = _split(keywords, names)
    if "parallel_config" in others:
        if "parallel" in ours:
            raise ConfigError("give parallel or parallel_config, which mean the same: got both")
        ours["parallel"] = others.pop("parallel_config")
    ignore_keywords(others, ours.get("parallel"), names)
    return ours


@cache
def flags_by_keyword() -> Mapping[str, ForeignFlag]:
    flags: dict[str, ForeignFlag] = {}
    for flag in (*_WITHOUT_FLAG, *VLLM_OMNI_FLAGS, *VLLM_FLAGS):
        for name in flag.names:
            if name.startswith("--"):
                flags.setdefault(name.removeprefix("--").replace("-", "_"), flag)
    return flags


def as_keywords(text: str) -> str:
    """A text of the flag tables, with keywords in place of flags."""
    return re.sub(r"--([a-z][a-z-]*)", lambda m: _SHORT_FLAGS.get(m[1], m[1].replace("-", "_")), text)
