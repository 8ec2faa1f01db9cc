"""`--enable-log-requests`: one log line for each HTTP request, without its prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vllm_omni.diffusion.messages.request import DiffusionRequest

logger = logging.getLogger(__name__)


def log_request(requests: Sequence[DiffusionRequest]) -> None:
    """Log one HTTP request. `requests`: the engine's requests for its `n` pictures, which differ in their seeds."""
    first = requests[0]
    adapter = "none" if first.lora is None else f"{first.lora.name} x {first.lora.scale:g}"
    logger.info(
        "request %s: size %dx%d, steps %d, n %d, seed %d, adapter %s",
        first.request_id.removesuffix("-0"),
        first.width,
        first.height,
        first.num_inference_steps,
        len(requests),
        first.seed,
        adapter,
    )
