"""Outputs of `generate`, and the writer of their videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vllm_omni.errors import RequestError
from vllm_omni.video_file import write_video

if TYPE_CHECKING:
    from vllm_omni.diffusion.messages.checkpoint import Checkpoint

__all__ = ["OmniRequestOutput", "write_video"]


@dataclass(frozen=True, slots=True)
class OmniRequestOutput:
    """Progress (`finished` False) or the result (`finished` True) of one prompt.

    `images`: in the result, one PIL image per output, and a list of frames per video (with `output_type="np"` uint8
    arrays [height, width, 3] and [frames, height, width, 3]); a video of one frame is a picture. In a progress message:
    the preview of output `index` (of a video one frame), its finished picture or video once `step` equals
    `num_inference_steps`, or nothing. `seeds`: seed of each output. `timings`: seconds by stage (`queue`,
    `text_encode`, `denoise`, `vae_decode`, `total`), and `computed_steps` and `cached_steps` (the part of the steps
    that came from the step cache), of the slowest output; `vae_tiling` is True, and else absent, where the VAE decoded
    it in tiles because the whole did not fit the memory.
    """

    request_id: str
    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    index: int = 0
    """Number of the output that a progress message is about, from 0."""
    step: int = 0
    """Denoising steps done."""
    num_inference_steps: int = 0
    num_prompt_tokens: int = 0
    num_input_image_tokens: int = 0
    """Image tokens (latent patches) of the pictures to edit."""
    num_output_tokens: int = 0
    """Image tokens (latent patches) over all outputs."""
    first_frame: int = 0
    """Number of the first of `frames`, from 0."""
    frames: np.ndarray | None = None
    """In a progress message: the next finished frames of the video of output `index`, while the rest is decoded. uint8
    [frames, height, width, 3]; None in all other messages."""
    error: RequestError | None = None
    """Failure of this prompt, which then has no images; see `Omni.generate`."""
    fps: int | None = None
    """Frames a second at which the videos are to be played; None: pictures, or the model does not say."""
    started: bool = False
    """Whether the first plan of output `index` has begun to run; the first message after that says only this."""
    encoded_share: float = 0.0
    """In a progress message: share of the encode of output `index`'s input pictures that is done, where the encode is
    cut into pieces; 0 in all other messages."""
    checkpoint: Checkpoint | None = None
    """In a progress message: a new checkpoint of output `index`; `generate(resume=...)` goes on from it."""
    checkpointed: bool = False
    """Whether a progress message brings a checkpoint, or answers `AsyncOmni.request_checkpoint`: `checkpoint` is None
    in an answer where nothing has run."""

    @property
    def request_output(self) -> OmniRequestOutput:
        """This output itself. In the public vllm-omni package an outer output wraps it under this name."""
        return self

    def __getitem__(self, index: int) -> OmniRequestOutput:
        """This output as item 0: in earlier releases of that package `request_output` is a list of one."""
        return [self][index]
