"""From a model name to its folder, its family and what the family's pictures cost. No torch here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights
from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, MODEL_INDEX, read_object, short
from vllm_omni.diffusion.catalog.hub import DEFAULT_ACCESS, CheckConfigs, HubAccess, ModelFolder, download, hub_reason
from vllm_omni.diffusion.catalog.tokenizer_files import TokenizerNeeds
from vllm_omni.diffusion.data import (
    CacheConfig,
    CacheDiTConfig,
    DiffusionParallelConfig,
    LoadFormat,
    OmniDiffusionConfig,
    TeaCacheConfig,
    flag_of,
)
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.inputs.adapter_files import adapter_file
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.inputs.field_values import WrongValueError
from vllm_omni.inputs.images import InputImage, ReaderSizes

DEMO_MODEL = "demo"
DEMO_MODEL_PATH = Path(__file__).parents[2] / "demo_model"
PACKED_PARAMETERS = ("height", "width", "num_inference_steps", "negative_prompt", "sigmas", "max_sequence_length")
"""Sampling parameters of every packed family."""
SIZES = ("height", "width")
MOST_PIXELS_A_SIDE = 2**16

# `_class_name` in model_index.json -> package under vllm_omni.diffusion.compute.families. A family's package has
# `info.py` (`describe(path) -> ModelInfo`, no torch) and `pipeline.py` (`Pipeline`).
FAMILIES: dict[str, str] = {
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "ZImagePipeline": "z_image",
}
FALLBACK_FAMILY = "diffusers_fallback"
"""Family of every other class."""


@dataclass(frozen=True)
class Guidance:
    """How a family's callers ask for classifier-free guidance."""

    parameter: str = "true_cfg_scale"
    """The sampling parameter that holds the scale."""
    offset: float = 0.0
    """Added to it gives s of `unconditional + s (conditional - unconditional)`; above 1 it guides."""
    negative_prompt: str | None = None
    """Stands in for a missing negative prompt; None: without one there is no guidance."""
    options: tuple[str, ...] = ()
    """Further sampling parameters of guidance that the family takes."""

    needs_negative_prompt: bool = True
    """False: without a negative prompt it guides all the same."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.parameter, *self.options)

    def asked_by(self, negative_prompt: str | None, params: Any) -> list[str]:
        """Names of the parameters that ask for guidance; without guidance, none of them has an effect.

        `params`: has each of `parameters` as an attribute. A scale that switches guidance off does not ask for it.
        """
        asked = [] if negative_prompt is None else ["negative_prompt"]
        for name in self.parameters:
            value = getattr(params, name)
            if value is not None and not (name == self.parameter and value + self.offset <= 1):
                asked.append(name)
        return asked

    def missing_half(self, negative_prompt: str | None, params: Any) -> str:
        """Name the half of guidance that a request leaves out while it gives the other; empty for any other request.

        Guidance needs both a scale and a negative prompt, unless the family has a substitute for the latter.
        """
        asked = self.asked_by(negative_prompt, params)
        if not asked:
            return ""
        has_scale = self.parameter in asked
        missing = (
            "a negative_prompt (an empty one will do)" if has_scale else f"{self.parameter} above {1 - self.offset:g}"
        )
        return f"{' and '.join(asked)} without {missing}"


class ImageInput(Protocol):
    """How an editing model takes the pictures that it edits."""

    @property
    def min_images(self) -> int:
        """Least pictures of one request: 1, or 0 where the model makes pictures from text alone as well."""

    @property
    def max_images(self) -> int:
        """Most pictures of one request."""

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """Sizes at which the model takes such a picture. Raises InvalidRequestError for impossible proportions."""

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """Tokens that these pictures add to the prompt that the transformer sees."""

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """(height, width) of what is made of these pictures, at least one, where no size is asked for."""


class SizeBin(NamedTuple):
    """A size that a pipeline makes, in pixels, and the ratio height / width that it is chosen by."""

    ratio: float
    height: int
    width: int


@dataclass(frozen=True)
class WholePipeline:
    """How diffusers' own pipeline serves a model: a request is one call of it, which stops after each step."""

    class_name: str
    parameters: tuple[str, ...]
    """The sampling parameters that its `__call__` has."""
    step_callback: str
    """Its parameter that takes a function to be called after a step; empty: its progress bar tells its steps."""
    max_running: int
    """Most requests that may be begun and not done."""
    takes_lora: bool = False
    follows_input: bool = False
    """img2img: the output has the input's size, so the input is resized to the requested size first."""
    takes_image_list: bool = False
    """Its `image` is a list of all pictures of a request."""
    takes_max_area: bool = False
    """Its call has `max_area`, a number of pixels that it fits any size to."""
    fps_name: str = "fps"
    """Name of the sampling parameter `fps` in its call."""
    output_name: str = "images"
    """The field of its output that holds what it makes: `images`, `image` or `frames`."""
    bins: tuple[SizeBin, ...] = ()
    """Sizes of which it makes the nearest one in shape, and resizes the picture; empty: it makes any size."""
    declines_binning: bool = False
    """Its call is told to make the size that is asked for: by itself it makes another one, and does not resize it."""
    remarks: tuple[str, ...] = ()
    """Lines for the log at start: where its defaults are not those of diffusers."""

    @property
    def makes_videos(self) -> bool:
        return "num_frames" in self.parameters

    def made_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the latents, in pixels, for a picture of that size."""
        if not self.bins:
            return height, width
        nearest = min(self.bins, key=lambda size: abs(size.ratio - height / width))
        return nearest.height, nearest.width

    def check_settings(self, config: OmniDiffusionConfig) -> None:
        """Raises ConfigError for settings of what only a packed family has."""
        if config.load_format != "auto":
            raise ConfigError(
                f"--load-format takes auto with a {self.class_name}, which diffusers loads, got {config.load_format}"
            )
        for name, only in (
            ("cache_backend", "none"),
            ("max_batch_tokens", None),
            ("quantization", None),
            ("kernels", "auto"),
            ("overlap_decode", False),
        ):
            if (value := getattr(config, name)) != only:
                given = flag_of(name) if value is True else f"{flag_of(name)} {value}"
                raise ConfigError(f"{given} needs packed steps, which a {self.class_name} does not have")
        if config.attention_backend is not None:
            raise ConfigError(
                f"--attention-backend {config.attention_backend}: a {self.class_name} runs diffusers' own attention, "
                "which takes none"
            )
        if config.enable_cpu_offload and config.enable_layerwise_offload:
            raise ConfigError("--enable-cpu-offload or --enable-layerwise-offload, got both")
        if config.lora_modules and not self.takes_lora:
            raise ConfigError(f"--lora-modules {', '.join(config.lora_modules)}: a {self.class_name} takes no adapters")
        for name, path in config.lora_modules.items():
            try:
                adapter_file(path)
            except WrongValueError as error:
                raise ConfigError(f"--lora-modules {name} takes {error}, got {path!r}") from error

    def check_parallel(self, parallel: DiffusionParallelConfig) -> None:
        """Raises ConfigError for every axis but data."""
        for axis in fields(parallel):
            if (value := getattr(parallel, axis.name)) > 1 and axis.name != "data_parallel_size":
                raise ConfigError(
                    f"{flag_of(axis.name)} takes 1 with a {self.class_name}, which runs whole, on one device (more of "
                    f"them with --data-parallel-size), got {value}"
                )


@dataclass(frozen=True)
class Shares:
    """Numbers of ranks that can share the weights of a component: each rank gets as much as the others."""

    counts: Mapping[str, int]
    """Numbers that the ranks divide among them, by their names, such as `attention heads`."""
    most: int | None = None
    """Most ranks that the family supports; None: as many as `counts` allow."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Valid numbers of ranks, in ascending order."""
        common = math.gcd(*self.counts.values())
        most = common if self.most is None else min(common, self.most)
        return tuple(size for size in range(1, most + 1) if common % size == 0)

    def check(self, flag: str, component: str, size: int) -> None:
        """Raise ConfigError, with the count that forbids it, where `size` ranks cannot share `component`."""
        if size in self.sizes:
            return
        uneven = [f"{count} {name}" for name, count in self.counts.items() if count % size]
        reason = f"cannot be divided by {size}" if uneven else f"are shared by at most {self.most} ranks"
        named = " and ".join(uneven or (f"{count} {name}" for name, count in self.counts.items()))
        valid = ", ".join(map(str, self.sizes))
        raise ConfigError(f"{flag} takes {valid} with {component}, whose {named} {reason}, got {size}")


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a model that the front end and the scheduler use, without its weights."""

    path: Path
    family: str
    size_multiple: int
    """Height and width must be multiples of this many pixels."""
    pixels_per_token: int
    """Side of the square of pixels that one image token stands for."""
    max_prompt_tokens: int
    """Longest prompt that the text encoder takes."""
    count_prompt_tokens: Callable[[str], int]
    """Tokens of a prompt as the text encoder counts them (without the fixed template)."""
    attention_tokens: float
    """Tokens at which attention costs as much as the linear layers: a sequence of n tokens costs n(1 + n/this)."""
    num_heads: int
    """Attention heads of the transformer."""
    head_dim: int
    """Channels of one of them."""
    num_blocks: int
    """Blocks of the transformer."""
    tensor_shares: Shares
    """How many ranks can share the transformer's weights."""
    text_encoder_shares: Shares
    """How many ranks can share the text encoder."""
    tokenizer_needs: TokenizerNeeds = field(default_factory=TokenizerNeeds)
    """Requirements on the tokenizer, which that of another model does not meet."""
    expected_weights: Mapping[str, Sequence[ExpectedWeights]] = field(default_factory=dict)
    """Component -> weights that its files must hold by its config; of other components nothing is known."""
    tea_cache_coefficients: tuple[float, ...] | None = None
    """TeaCache's polynomial, highest power first; None: nobody has measured it for this model."""
    guidance: Guidance = Guidance()
    token_multiple: int = 1
    """The model fills a text and a picture up to a multiple of this many tokens each."""
    image_input: ImageInput | None = None
    """None: the model makes pictures from text alone."""
    latent_frames: int = 1
    """Frames of a video for each latent frame, without the first frame: their number is a multiple of it."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """The model folder's own defaults over the family's; may hold `negative_prompt`."""
    max_side: int | None = None
    """Pixels of the longest side that the model can make; None: it knows no bound."""
    whole: WholePipeline | None = None
    """None: a packed family serves the model."""
    hub_failure: str = ""
    """Reason why `path` is an earlier download of a hub model; empty for any other folder."""

    @property
    def served_by(self) -> Literal["packed", "diffusers"]:
        """Which path serves the model."""
        return "packed" if self.whole is None else "diffusers"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Sampling parameters that have a meaning for the model."""
        if self.whole is None:
            return (*self.guidance.parameters, *PACKED_PARAMETERS)
        return tuple(dict.fromkeys((*SIZES, *self.whole.parameters)))

    @property
    def makes_videos(self) -> bool:
        return self.whole is not None and self.whole.makes_videos

    def num_image_tokens(self, height: int, width: int, num_frames: int = 1) -> int:
        """Image tokens that a picture or video of that size costs."""
        if self.whole is not None:
            height, width = self.whole.made_size(height, width)
        num_latent_frames = 1 + (num_frames - 1) // self.latent_frames
        return num_latent_frames * (height // self.pixels_per_token) * (width // self.pixels_per_token)

    def num_reference_tokens(self, image: InputImage) -> int:
        """Image tokens of an input picture. A whole pipeline brings a large one to the model's own size."""
        num_tokens = self.num_image_tokens(*image.reference.shape[:2])
        if self.whole is None or self.whole.follows_input:
            return num_tokens
        own = self.default_sampling_params
        return min(num_tokens, self.num_image_tokens(own["height"], own["width"]))

    def num_sequence_tokens(self, num_text_tokens: int, num_image_tokens: int) -> int:
        """Tokens of one guidance branch in the transformer, with the padding."""
        return sum(-(-n // self.token_multiple) * self.token_multiple for n in (num_text_tokens, num_image_tokens))

    def count_image_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """Tokens that input pictures add to the prompt."""
        return 0 if self.image_input is None else self.image_input.count_prompt_tokens(images)

    def check_settings(self, config: OmniDiffusionConfig) -> None:
        """Raises ConfigError for settings that the path that serves the model does not know."""
        if self.whole is not None:
            self.whole.check_settings(config)
            return
        for name in ("enable_cpu_offload", "enable_layerwise_offload", "lora_modules"):
            if getattr(config, name):
                raise NotAvailableError(
                    f"{flag_of(name)}: not available yet with a packed family, such as this model's"
                )

    def check_parallel(self, parallel: DiffusionParallelConfig) -> None:
        """Raises ConfigError for degrees that this model does not allow, with the valid ones."""
        if self.whole is not None:
            self.whole.check_parallel(parallel)
            return
        heads, tensor, ulysses = self.num_heads, parallel.tensor_parallel_size, parallel.ulysses_degree
        self.tensor_shares.check("--tensor-parallel-size", "this model's transformer", tensor)
        self.text_encoder_shares.check(
            "--text-encoder-tp-size", "this model's text encoder", parallel.text_encoder_tp_size
        )
        if ulysses > heads // tensor:
            raise ConfigError(
                f"--usp takes 1 to {heads // tensor}, the model's {heads} heads over --tensor-parallel-size {tensor}, "
                f"got {ulysses}"
            )

    def check_cache(self, cache: CacheConfig | None) -> None:
        """Raises ConfigError for settings of a step cache that make no sense with this model."""
        if isinstance(cache, TeaCacheConfig) and cache.coefficients is None and self.tea_cache_coefficients is None:
            raise ConfigError(
                "--cache-backend tea_cache needs --cache-config coefficients for this model: nobody has measured them; "
                "vllm-omni calibrate-teacache MODEL does"
            )
        if isinstance(cache, CacheDiTConfig):
            first, last = cache.Fn_compute_blocks, cache.Bn_compute_blocks
            if first + last >= self.num_blocks:
                raise ConfigError(
                    f"--cache-config: Fn_compute_blocks and Bn_compute_blocks take less than the model's "
                    f"{self.num_blocks} blocks together, got {first} and {last}"
                )

    def sequence_cost(self, num_tokens: int) -> float:
        """Work of one forward of one sequence, in units of one token's linear layers."""
        return num_tokens * (1 + num_tokens / self.attention_tokens)


def find_folder(model: str, load_format: LoadFormat, access: HubAccess, check: CheckConfigs) -> ModelFolder:
    """The local folder of `model`: `demo`, a folder, or a hub name (downloaded: safetensors only).

    With `dummy` no weights are downloaded, and with `auto` only after `check` accepts the configs. Raises ConfigError
    when there is no such folder and the hub has no answer.
    """
    path = DEMO_MODEL_PATH if model == DEMO_MODEL else Path(model).expanduser()
    if path.is_dir():
        if access.revision is not None:
            raise ConfigError(f"--revision {access.revision} is for hub models; {model!r} is a folder, which has none")
        return _in_diffusers_layout(ModelFolder(path), model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:  # no name that the hub could have
        raise ConfigError(f"model {model!r}: there is no such folder")
    return _in_diffusers_layout(download(model, load_format, access, check), model)


def _in_diffusers_layout(folder: ModelFolder, model: str) -> ModelFolder:
    if not (folder.path / MODEL_INDEX).is_file():
        raise ConfigError(f"model {model!r} is not in the diffusers layout: it has no model_index.json")
    return folder


def load_model_info(
    model: str,
    load_format: LoadFormat = "auto",
    access: HubAccess = DEFAULT_ACCESS,
    check: Callable[[ModelInfo], object] = lambda info: None,
) -> ModelInfo:
    """Find the folder and family of `model`.

    check: raises ConfigError for settings that the model does not take. Raises ConfigError for a pipeline class that
    nothing here serves. Weights of a hub model are downloaded only after both.
    """
    folder = find_folder(model, load_format, access, lambda path: check(_describe(path)))
    with hub_reason(*folder):
        info = _describe(folder.path)
    check(info)
    return replace(info, hub_failure=folder.hub_failure)


def _describe(path: Path) -> ModelInfo:
    module = import_module(f"vllm_omni.diffusion.compute.families.{family_of(path)}.info")
    info: ModelInfo = module.describe(path)
    return info


def family_of(path: Path) -> str:
    """Package under `vllm_omni.diffusion.compute.families` that serves the model folder `path`.

    Raises ConfigError where model_index.json names no pipeline class.
    """
    class_name = read_object(path, MODEL_INDEX).get("_class_name")
    if class_name is None:
        raise ConfigError(f"model {str(path)!r}: model_index.json names no _class_name")
    return FAMILIES.get(class_name, FALLBACK_FAMILY) if isinstance(class_name, str) else FALLBACK_FAMILY


def read_default_sampling_params(path: Path) -> dict[str, Any]:
    """Sampling defaults of the model folder, {} where it has none.

    Raises ConfigError for unknown keys, for null, and for impossible sides; the rest is checked with the limits.
    """
    if not os.path.lexists(path / DEFAULTS_FILE):  # a link to nothing is told
        return {}
    values = read_object(path, DEFAULTS_FILE)
    accepted = {f.name for f in fields(OmniDiffusionSamplingParams) if f.default is None} | {"negative_prompt"}
    if unknown := sorted(set(values) - accepted):
        raise ConfigError(f"{DEFAULTS_FILE} has unknown keys {unknown}, accepted are {', '.join(sorted(accepted))}")
    for key, value in values.items():
        is_side = type(value) is int and 1 <= value <= MOST_PIXELS_A_SIDE
        if value is None or (key in SIZES and not is_side):
            takes = f"pixels, 1 to {MOST_PIXELS_A_SIDE}" if key in SIZES else "a value, or is left out"
            raise ConfigError(f"{DEFAULTS_FILE}: {key} takes {takes}, got {short(value)}")
    return values
