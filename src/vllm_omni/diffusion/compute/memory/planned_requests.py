"""Requests that memory is planned for: one of the model's default size, and the largest one that is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.startup.warmup_requests import default_request
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.inputs.images import InputImage

NO_LIMIT = 2**31
"""Value of a limit that bounds nothing."""
NUM_BRANCHES = 2
"""Branches of a request with guidance."""


@dataclass(frozen=True)
class PlannedRequest:
    """Size of a request, and the tokens that it has."""

    height: int
    width: int
    num_frames: int
    branch_tokens: tuple[int, ...]
    """Tokens of each guidance branch in the transformer."""
    encoded_tokens: int
    """Tokens of a prompt in the text encoder."""
    num_steps: int

    def rank_tokens(self, parallel: DiffusionParallelConfig) -> int:
        """Tokens on the rank that has most: of its branches, and of these its shard."""
        mine = self.branch_tokens[: -(-len(self.branch_tokens) // parallel.cfg_parallel_size)]
        return sum(-(-n // (parallel.ulysses_degree * parallel.ring_degree)) for n in mine)

    @property
    def written_out(self) -> str:
        frames = "" if self.num_frames == 1 else f", {self.num_frames} frames"
        return f"{self.width}x{self.height}{frames}{', guided' if len(self.branch_tokens) > 1 else ''}"


def default_planned_request(info: PackedModelInfo) -> PlannedRequest:
    """A request of the model's default size, guidance and longest prompt."""
    request = default_request(info, None)
    return sized_planned_request(info, request.height, request.width)


def sized_planned_request(info: PackedModelInfo, height: int, width: int) -> PlannedRequest:
    """A request of the model's default guidance and frames, longest prompt, and the given size in pixels."""
    request = default_request(info, None)
    branches = NUM_BRANCHES if request.has_guidance else 1
    prompt_tokens = min(request.max_sequence_length, info.max_prompt_tokens)
    return _planned(info, height, width, request.num_frames, branches, prompt_tokens, request.images)


def largest_planned_request(config: OmniDiffusionConfig, info: PackedModelInfo) -> PlannedRequest:
    """The largest request that a server accepts: a square of its most pixels, guided, with the most input pictures.

    Where there is no limit, as for offline use, the default one counts.
    """
    side = info.size_multiple
    pixels = _limit(config.max_pixels, info.default_max_pixels)
    frames = _limit(config.max_num_frames, int(info.default_sampling_params.get("num_frames", 1)))
    rows = max(1, int((pixels**0.5) // side))
    columns = max(1, pixels // (rows * side) // side)
    images = default_request(info, None).images
    if info.image_input is not None and images:
        images = (images[0],) * info.image_input.max_images
    return _planned(
        info,
        rows * side,
        columns * side,
        frames,
        NUM_BRANCHES,
        info.max_prompt_tokens,
        images,
    )


def _limit(given: int | None, default: int) -> int:
    return default if given is None or given >= NO_LIMIT else given


def _planned(
    info: PackedModelInfo,
    height: int,
    width: int,
    num_frames: int,
    num_branches: int,
    prompt_tokens: int,
    images: Sequence[InputImage],
) -> PlannedRequest:
    if images:
        prompt_tokens += info.count_image_prompt_tokens(images)
    num_references = sum(map(info.num_reference_tokens, images))
    num_image_tokens = info.num_image_tokens(height, width, num_frames)
    return PlannedRequest(
        height,
        width,
        num_frames,
        info.branch_tokens([prompt_tokens] * num_branches, num_image_tokens, num_references),
        info.num_encoded_tokens(prompt_tokens),
        int(info.default_sampling_params.get("num_inference_steps", 1)),
    )
