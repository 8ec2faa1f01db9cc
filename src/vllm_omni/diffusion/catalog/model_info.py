"""Facts of a model that the front end and the scheduler use, read without its weights. No torch here.

`packed_info.PackedModelInfo` is the kind of our own families, `whole_info.WholeModelInfo` that of diffusers' pipelines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights
from vllm_omni.diffusion.catalog.tokenizer_files import TokenizerNeeds
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.inputs.images import InputImage, ReaderSizes, resize_image

SIZES = ("height", "width")
LEAST_MAX_PIXELS = 1024 * 1024
"""Lower bound of the default limit of a picture's pixels: clients ask for common sizes like 512x512 from any model."""


@dataclass(frozen=True)
class Guidance:
    """Sampling parameters by which a request asks for classifier-free guidance."""

    parameter: str = "true_cfg_scale"
    """Name of the sampling parameter that holds the scale."""
    offset: float = 0.0
    """Added to that parameter to get s of `unconditional + s (conditional - unconditional)`; s above 1 guides."""
    negative_prompt: str | None = None
    """Default negative prompt; None: a request without a negative prompt runs without guidance."""
    options: tuple[str, ...] = ()
    """Names of further sampling parameters that change guidance."""
    needs_negative_prompt: bool = True
    """False: the model also guides without a negative prompt."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.parameter, *self.options)

    def resolved(self, scale: float | None, negative_prompt: str | None) -> tuple[float, str | None]:
        """Scale s of `unconditional + s (conditional - unconditional)` and negative prompt that a request runs with.

        The only rule for guidance: a request has it when this s is above 1. Without guidance for lack of a negative
        prompt, s is 1.
        """
        s = 1.0 if scale is None else scale + self.offset
        if s > 1 and negative_prompt is None:
            negative_prompt = self.negative_prompt
            if negative_prompt is None and self.needs_negative_prompt:
                s = 1.0
        return s, negative_prompt

    def asked_by(self, negative_prompt: str | None, params: Any) -> list[str]:
        """Names of the parameters that are given and have an effect only with guidance."""
        asked = [] if negative_prompt is None else ["negative_prompt"]
        for name in self.parameters:
            value = getattr(params, name)
            if value is not None and not (name == self.parameter and value + self.offset <= 1):
                asked.append(name)
        return asked

    def missing_half(self, negative_prompt: str | None, params: Any) -> str:
        """Warning about a scale without negative prompt, or the reverse, where guidance needs both; else empty."""
        asked = self.asked_by(negative_prompt, params)
        if not asked:
            return ""
        has_scale = self.parameter in asked
        missing = (
            "a negative_prompt (an empty one will do)" if has_scale else f"{self.parameter} above {1 - self.offset:g}"
        )
        return f"{' and '.join(asked)} without {missing}"


class ImageInput(Protocol):
    """Rules of an editing model for its input pictures."""

    @property
    def min_images(self) -> int:
        """Least pictures of one request: 1, or 0 for a model that also makes pictures from text alone."""

    @property
    def max_images(self) -> int:
        """Most pictures of one request."""

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """Sizes to which a picture is resized for the model. Raises InvalidRequestError for odd proportions."""

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """Tokens that these pictures add to the prompt that the transformer sees."""

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """Default (height, width) of the output for these input pictures, at least one."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo(ABC):
    """Sizes, limits, prices and defaults of one model folder."""

    served_by: ClassVar[Literal["packed", "diffusers"]]
    """Code that runs the model: our packed families, or a pipeline of diffusers."""
    gives_previews: ClassVar[bool]
    """Whether pictures can be decoded from the latents of an unfinished request."""
    gives_checkpoints: ClassVar[bool]
    """Whether the state of an unfinished request can be saved, and the request resumed from it."""
    shares_encodings: ClassVar[bool]
    """Whether requests with the same prompt encode it once."""
    decodes_in_pieces: ClassVar[bool]
    """Whether the decode of a video is cut into latent frames, so that other requests run between them."""
    max_num_seqs: ClassVar[int | None] = None
    """Most requests that gain from sharing a step; None: as many as the device has room for."""

    path: Path
    family: str
    """Name of the package in `compute/families`."""
    size_multiple: int
    """Height and width must be multiples of this many pixels."""
    pixels_per_token: int
    """Side of the square of pixels that one image token stands for."""
    max_prompt_tokens: int
    """Longest prompt that the text encoder takes."""
    count_prompt_tokens: Callable[[str], int]
    """Number of tokens of a prompt, without the fixed template around it."""
    attention_tokens: float
    """Tokens at which attention costs as much as the linear layers: a sequence of n tokens costs n(1 + n/this)."""
    tokenizer_needs: TokenizerNeeds = field(default_factory=TokenizerNeeds)
    """Requirements on the tokenizer, which that of another model does not meet."""
    expected_weights: Mapping[str, Sequence[ExpectedWeights]] = field(default_factory=dict)
    """Component -> weights that its files must hold by its config; components that are not listed are not checked."""
    guidance: Guidance = Guidance()
    image_input: ImageInput | None = None
    """Rules for input pictures; None: the model makes pictures from text alone."""
    frame_multiple: int | None = None
    """Frames of a video for each latent frame after the first: the number of frames is a multiple of it, plus one.
    None: the model makes single pictures."""
    default_fps: int | None = None
    """Frames a second at which a video of the model is played; None: the model does not say."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """The model folder's own defaults over the family's; may hold `negative_prompt`."""
    max_side: int | None = None
    """Pixels of the longest side that the model can make; None: it has no limit."""
    remarks: tuple[str, ...] = ()
    """Lines for the log at start: defaults that differ from those of diffusers."""
    hub_failure: str = ""
    """Reason why `path` is an earlier download of a hub model; empty for any other folder."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Sampling parameters that have a meaning for the model."""

    @property
    @abstractmethod
    def why_no_adapters(self) -> str:
        """Reason why the model takes no LoRA adapters; empty: it takes them."""

    @property
    def makes_videos(self) -> bool:
        return self.frame_multiple is not None

    @property
    def needs_image(self) -> bool:
        """Whether every request needs an input picture."""
        return self.image_input is not None and self.image_input.min_images > 0

    @property
    def edits_pictures(self) -> bool:
        """Whether pictures are made from input pictures; a model that makes videos makes videos from them."""
        return self.image_input is not None and not self.makes_videos

    @property
    def input_modalities(self) -> list[Literal["text", "image"]]:
        """Media that a request may bring."""
        return ["text"] if self.image_input is None else ["text", "image"]

    @property
    def output_modalities(self) -> list[Literal["image", "video"]]:
        """Media that the model makes. A picture of a model that makes videos is a video of one frame, from text."""
        if not self.makes_videos:
            return ["image"]
        return ["video"] if self.needs_image else ["image", "video"]

    @property
    def follows_input(self) -> bool:
        """Whether the output has the input picture's size (img2img), so that the input is resized to the request's."""
        return False

    @property
    def max_running(self) -> int | None:
        """Most requests that may be under way at once; None: no limit of the model's own."""
        return None

    @property
    def default_max_pixels(self) -> int:
        """Most pixels of a picture without `--max-pixels`: four times the model's own size."""
        own = self.default_sampling_params
        return max(LEAST_MAX_PIXELS, 4 * int(own["height"]) * int(own["width"]))

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video: one for the first frame, and one for each further `frame_multiple` frames."""
        return 1 + (num_frames - 1) // (self.frame_multiple or 1)

    def num_image_tokens(self, height: int, width: int, num_frames: int = 1) -> int:
        """Image tokens of a picture or video; height and width in pixels."""
        rows, columns = height // self.pixels_per_token, width // self.pixels_per_token
        return self.latent_frames(num_frames) * rows * columns

    def num_decoded_tokens(self, height: int, width: int, num_frames: int = 1) -> int:
        """Image tokens of all frames, by which a decode is priced.

        Most of a decode's work is at the resolution of the frames, and a latent frame after the first becomes
        `frame_multiple` of them.
        """
        return num_frames * self.num_image_tokens(height, width)

    def fit_image(self, image: InputImage, height: int, width: int) -> InputImage:
        """Input picture with no more pixels than the model reads for an output of this size, in pixels."""
        return resize_image(image, height, width) if self.follows_input else image

    def num_reference_tokens(self, image: InputImage) -> int:
        """Image tokens of an input picture; 0 for a model that makes none of it."""
        return self.num_image_tokens(*image.reference.shape[:2])

    def num_encoded_image_tokens(
        self, images: Sequence[InputImage], height: int, width: int, num_frames: int = 1
    ) -> int:
        """Image tokens of one frame each, by which encoding `images` is priced as a decode.

        height, width, num_frames: of the request.
        """
        return sum(map(self.num_reference_tokens, images))

    def num_encoded_frames(self, images: Sequence[InputImage], num_frames: int) -> int:
        """Latent frames of the conditioning video that is made of `images`, whose encode is cut into pieces.

        1: the input pictures are encoded whole. num_frames: of the request.
        """
        return 1

    def num_sequence_tokens(self, num_text_tokens: int, num_image_tokens: int) -> int:
        """Tokens of one guidance branch in the transformer, with the model's own padding."""
        return num_text_tokens + num_image_tokens

    def branch_tokens(self, text_tokens: Sequence[int], num_image_tokens: int, num_references: int) -> tuple[int, ...]:
        """Tokens of each branch, from its text tokens and those of the output and of the input pictures."""
        if not self.follows_input:
            num_image_tokens += num_references
        return tuple(self.num_sequence_tokens(n, num_image_tokens) for n in text_tokens)

    def count_image_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """Tokens that input pictures add to the prompt."""
        return 0 if self.image_input is None else self.image_input.count_prompt_tokens(images)

    def num_encoded_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that the text encoder reads for a prompt of `num_prompt_tokens`, with its padding."""
        return num_prompt_tokens

    def sequence_cost(self, num_tokens: int) -> float:
        """Work of one forward of one sequence, in units of one token's linear layers."""
        return num_tokens * (1 + num_tokens / self.attention_tokens)

    def adapter_cost(self, num_weights: int) -> float:
        """Work that adapters with this number of weights add to a token, in the same units; 0: it is not known."""
        return 0.0

    @abstractmethod
    def check_settings(self, config: OmniDiffusionConfig) -> None:
        """Raise ConfigError for settings that the model does not take."""

    @abstractmethod
    def check_parallel(self, parallel: DiffusionParallelConfig) -> None:
        """Raise ConfigError, with the valid degrees, for degrees that the model does not allow."""
