"""Facts of a model that diffusers' own pipeline serves: `ModelInfo` with the pipeline's call. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from vllm_omni.diffusion.catalog.model_info import SIZES, ModelInfo
from vllm_omni.diffusion.data import TRANSFORMER_FILES, DiffusionParallelConfig, OmniDiffusionConfig, flag_of
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.adapter_files import served_files
from vllm_omni.inputs.images import InputImage


class SizeBin(NamedTuple):
    """Size that a pipeline makes, in pixels, and the ratio height / width by which it is chosen."""

    ratio: float
    height: int
    width: int


@dataclass(frozen=True)
class WholePipeline:
    """Call of diffusers' own pipeline class: one call makes one request, and stops after each step."""

    class_name: str
    parameters: tuple[str, ...]
    """Sampling parameters that its `__call__` has."""
    step_callback: str
    """Name of its parameter for a function that is called after each step; empty: it has none, and the progress bar
    counts steps."""
    max_running: int
    """Most requests that may be under way at once."""
    takes_lora: bool = False
    takes_flow_shift: bool = False
    """Whether its noise scheduler has a shift that a request may set; its `__call__` has no such parameter."""
    follows_input: bool = False
    """img2img: the output has the input's size, so the input is resized to the requested size first."""
    takes_image_list: bool = False
    """Whether its `image` is a list of all pictures of a request."""
    takes_max_area: bool = False
    """Whether its call has `max_area`, a number of pixels to which it fits any size."""
    fps_name: str = "fps"
    """Name of the sampling parameter `fps` in its call."""
    output_name: str = "images"
    """Field of its output that holds the pictures or videos: `images`, `image` or `frames`."""
    bins: tuple[SizeBin, ...] = ()
    """Sizes that it makes: it takes the one nearest in shape and resizes the picture; empty: it makes any size."""
    declines_binning: bool = False
    """Whether its call must be told to make the requested size; otherwise it makes another size, without resizing."""

    @property
    def makes_videos(self) -> bool:
        return "num_frames" in self.parameters

    def made_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width), in pixels, at which the pipeline computes a picture of the requested size."""
        if not self.bins:
            return height, width
        nearest = min(self.bins, key=lambda size: abs(size.ratio - height / width))
        return nearest.height, nearest.width


@dataclass(frozen=True, kw_only=True)
class WholeModelInfo(ModelInfo):
    """Facts of a model that a whole pipeline serves."""

    served_by = "diffusers"
    gives_previews = False
    gives_checkpoints = False
    shares_encodings = False
    decodes_in_pieces = False
    max_num_seqs = 1
    """One request a step: several would take turns in it, and an abort would wait for all of them."""

    pipeline: WholePipeline

    @property
    def parameters(self) -> tuple[str, ...]:
        names = dict.fromkeys((*SIZES, *self.pipeline.parameters))
        if self.makes_videos and "fps" in names:
            names["seconds"] = None
        if self.pipeline.takes_flow_shift:
            names["flow_shift"] = None
        return tuple(names)

    @property
    def why_no_adapters(self) -> str:
        return "" if self.pipeline.takes_lora else f"a {self.pipeline.class_name} takes no LoRA adapters"

    @property
    def follows_input(self) -> bool:
        return self.pipeline.follows_input

    @property
    def max_running(self) -> int:
        return self.pipeline.max_running

    def num_image_tokens(self, height: int, width: int, num_frames: int = 1) -> int:
        return super().num_image_tokens(*self.pipeline.made_size(height, width), num_frames)

    def num_reference_tokens(self, image: InputImage) -> int:
        """Image tokens of an input picture. The pipeline resizes a large one to the model's own size."""
        num_tokens = super().num_reference_tokens(image)
        if self.follows_input:
            return num_tokens
        own = self.default_sampling_params
        return min(num_tokens, self.num_image_tokens(own["height"], own["width"]))

    def check_settings(self, config: OmniDiffusionConfig) -> None:
        """Raise ConfigError for settings that only a packed family has."""
        class_name = self.pipeline.class_name
        if config.load_format != "auto":
            raise ConfigError(
                f"--load-format takes auto with a {class_name}, which diffusers loads, got {config.load_format}"
            )
        for name, only in (
            ("cache_backend", "none"),
            ("max_batch_tokens", None),
            ("quantization", None),
            ("text_encoder_quantization", None),
            ("kernels", "auto"),
            ("overlap_decode", False),
        ):
            if (value := getattr(config, name)) != only:
                given = flag_of(name) if value is True else f"{flag_of(name)} {value}"
                raise ConfigError(f"{given} needs packed steps, which a {class_name} does not have")
        for component, file in config.transformer_files.items():
            raise ConfigError(
                f"{flag_of(TRANSFORMER_FILES[component])} {file}: a {class_name} is loaded by diffusers, from the "
                "model folder alone"
            )
        if config.attention_backend is not None:
            raise ConfigError(
                f"--attention-backend {config.attention_backend}: a {class_name} runs diffusers' own attention, "
                "which takes none"
            )
        if config.lora_modules and not self.pipeline.takes_lora:
            raise ConfigError(f"--lora-modules {', '.join(config.lora_modules)}: a {class_name} takes no adapters")
        served_files(config.lora_modules)

    def check_parallel(self, parallel: DiffusionParallelConfig) -> None:
        """Raise ConfigError for a degree above 1 of any axis but data."""
        for axis in fields(parallel):
            if (value := getattr(parallel, axis.name)) > 1 and axis.name != "data_parallel_size":
                raise ConfigError(
                    f"{flag_of(axis.name)} takes 1 with a {self.pipeline.class_name}, which runs whole, on one device "
                    f"(more of them with --data-parallel-size), got {value}"
                )
