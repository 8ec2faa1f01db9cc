"""`vllm-omni plan MODEL [flags of serve]`: print the memory that a server would need, without a GPU and weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_omni.diffusion.catalog.hub import HubAccess
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli import flag_types
from vllm_omni.entrypoints.cli.args import parse_args as parse_serve_args
from vllm_omni.entrypoints.cli.commands import PLAN, SERVE
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vllm_omni.diffusion.catalog.model_info import ModelInfo
    from vllm_omni.diffusion.compute.memory.budget import DeviceLimits

DEVICE_MEMORY = "--device-memory"
HELP = f"""usage: vllm-omni {PLAN} MODEL [flags of `vllm serve MODEL --omni`] [{DEVICE_MEMORY} SIZE]

Print the memory that a server of MODEL would need, by weights, activations and reserve, and whether it fits. If it does
not, print the flags with which it would. Reads config files, and headers of weight files where sizes depend on them.

  {DEVICE_MEMORY} SIZE  memory of each GPU, such as 24GiB, 80GB or 8192MiB; none: that of this machine's device

exit codes: 0 the model fits, 1 it does not, 2 a setting is wrong"""
FITS, FITS_NOT = 0, 1
PLANNED_DEVICES = 8
"""Devices that a plan for another machine may use."""


@dataclass(frozen=True)
class PlanArgs:
    config: OmniDiffusionConfig
    device_bytes: int | None = None
    """Memory of the device; None: that of this machine."""


def parse_args(words: Sequence[str]) -> PlanArgs:
    """Parse the words after the command's name. Raises ConfigError; `--help` raises SystemExit(0)."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        raise SystemExit(0)
    rest: list[str] = []
    device_bytes = None
    given = iter(words)
    for word in given:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != DEVICE_MEMORY:
            rest.append(word)
            continue
        try:
            device_bytes = flag_types.memory_size(value if equals else next(given, ""))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{DEVICE_MEMORY} {error}") from error
    return PlanArgs(parse_serve_args([SERVE, *rest], "vllm-omni").config, device_bytes)


def plan(args: PlanArgs) -> int:
    """Print the plan; return the exit code. Raises ConfigError for a model or settings that cannot be served."""
    # Not at the top: these modules import torch.
    from vllm_omni.diffusion.catalog.model_adapters import with_model_adapters
    from vllm_omni.diffusion.catalog.registry import load_model_info
    from vllm_omni.diffusion.compute.memory.budget import memory_budget
    from vllm_omni.diffusion.compute.memory.remedies import find_remedies
    from vllm_omni.diffusion.compute.memory.report import remedy_table, table, verdict

    config = args.config

    def check(info: ModelInfo) -> None:
        info.check_settings(config)
        info.check_parallel(config.parallel)

    info = load_model_info(config.model, "dummy", HubAccess.of(config), check)  # without weights
    config = with_model_adapters(config, info).with_adapter_files()
    limits, dtype, float8 = _device(config, args.device_bytes)
    budget = memory_budget(config, info, limits, dtype)
    print(f"memory of each rank, {config.parallel.written_out()}, {str(dtype).removeprefix('torch.')}:")
    print(table(budget))
    print(verdict(budget))
    if budget.fits:
        return FITS
    print(remedy_table(find_remedies(config, info, budget, dtype, float8)))
    return FITS_NOT


def _device(config: OmniDiffusionConfig, num_bytes: int | None) -> tuple[DeviceLimits, torch.dtype, bool]:
    """Limits, the model's dtype, and whether the device multiplies in float8, for this machine or another one."""
    import torch

    from vllm_omni.diffusion.compute.device.device import Device
    from vllm_omni.diffusion.compute.device.kinds import CPU
    from vllm_omni.diffusion.compute.memory.budget import DeviceLimits
    from vllm_omni.diffusion.compute.memory.check import limits_of

    if num_bytes is None:
        device = Device(config.device, 0, config.gpu_memory_utilization)
        return limits_of(device), device.dtype(config.dtype), device.multiplies_float8
    if config.device == CPU:
        return DeviceLimits(num_bytes, num_bytes, is_gpu=False), Device(CPU).dtype(config.dtype), True
    dtype: torch.dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    given = int(config.gpu_memory_utilization * num_bytes)
    return DeviceLimits(num_bytes, given, device_count=PLANNED_DEVICES), dtype, True
