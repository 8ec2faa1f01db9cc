"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from vllm_omni.errors import RequestError


@dataclass(frozen=True, slots=True)
class OmniRequestOutput:
    """Progress (`finished` False) or the result (`finished` True) of one prompt.

    `images`: PIL images, one an output (for video a list of frames an output; with `output_type="np"` uint8 arrays
    [height, width, 3], of videos [frames, height, width, 3]); in a progress message the preview of
    output `index`, its picture once `step` has reached `num_inference_steps`, or nothing. `seeds`: the seed of each
    output. `timings`: seconds by stage (`queue`, `text_encode`, `denoise`, `vae_decode`, `total`) and
    `computed_steps` and `cached_steps` (the part that a step cache made), of the slowest output.
    """

    request_id: str
    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    index: int = 0
    """Which output of the prompt a progress message speaks of."""
    step: int = 0
    """Denoising steps done."""
    num_inference_steps: int = 0
    num_prompt_tokens: int = 0
    num_input_image_tokens: int = 0
    """Image tokens (latent patches) of the pictures to edit."""
    num_output_tokens: int = 0
    """Image tokens (latent patches) over all outputs."""
    error: RequestError | None = None
    """Failure of this prompt, which then has no images; see `Omni.generate`."""

    @property
    def request_output(self) -> OmniRequestOutput:
        """This output. The public vllm-omni package wraps an output in another one, which has it here."""
        return self

    def __getitem__(self, index: int) -> OmniRequestOutput:
        """This output as item 0: earlier releases of that package have a list of one as `request_output`."""
        return [self][index]
