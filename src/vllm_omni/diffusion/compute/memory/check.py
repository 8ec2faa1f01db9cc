"""Check of a device's memory at the start of a worker: the table in the log, and the refusal of what cannot fit."""

from __future__ import annotations

import logging

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.kinds import CUDA, num_devices
from vllm_omni.diffusion.compute.memory.budget import DeviceLimits, memory_budget
from vllm_omni.diffusion.compute.memory.remedies import find_remedies
from vllm_omni.diffusion.compute.memory.report import refusal, table, warning
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)


def limits_of(device: Device, ranks: Ranks | None = None) -> DeviceLimits:
    """Memory of a worker's device: of ranks, which all call this together, that of the one with least."""
    is_gpu = device.kind == CUDA
    given = device.memory_budget()
    return DeviceLimits(
        device.memory_bytes,
        given if ranks is None else int(ranks.least(given)),
        device.others_memory_bytes,
        is_gpu,
        num_devices(device.kind),
    )


def check_memory(config: OmniDiffusionConfig, info: ModelInfo, device: Device, ranks: Ranks) -> None:
    """Log the budget of a rank's memory. All ranks of a replica call this together; the first one checks.

    Raises ConfigError, with flags that help, for a model that cannot fit.
    """
    limits = limits_of(device, ranks)
    if ranks.mesh.world.rank > 0:  # none holds more than the first one
        return
    dtype = device.dtype(config.dtype)
    budget = memory_budget(config, info, limits, dtype)
    logger.info("memory of this rank:\n%s", table(budget))
    if not budget.fits:
        remedies = find_remedies(config, info, budget, dtype, device.multiplies_float8)
        raise ConfigError(refusal(budget, remedies))
    if line := warning(budget):
        logger.warning("%s", line)
