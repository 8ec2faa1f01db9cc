"""Reading of the weights of text and image encoders, which transformers saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from vllm_omni.diffusion.catalog.model_index import TRANSFORMERS_STEMS
from vllm_omni.diffusion.compute.weights.loading import (
    Allocate,
    OnBytes,
    load_weights,
    reads_files,
    weight_names,
)
from vllm_omni.diffusion.data import LoadFormat


@dataclass(frozen=True)
class WeightReader:
    """Reads encoders onto one device."""

    device: torch.device
    dtype: torch.dtype
    on_bytes: OnBytes = lambda count: None
    load_format: LoadFormat = "auto"
    variant: str | None = None
    modules: list[nn.Module] = field(default_factory=list)
    """Modules that were filled, in order."""
    allocate: Allocate | None = None
    """See `load_weights`."""

    def names(self, folder: Path) -> Sequence[str]:
        """Names of the weights in the files of `folder`; none where no file is read: see `reads_files`."""
        is_read = reads_files(self.load_format, self.device)
        return weight_names(folder, self.variant, TRANSFORMERS_STEMS) if is_read else ()

    def load(
        self,
        module: nn.Module,
        folder: Path,
        names: Mapping[str, tuple[str, ...]],
        prefix: str = "",
        unread: tuple[str, ...] = (),
    ) -> None:
        """Fill `module` from `folder`: see `load_weights`. Raises ConfigError."""
        load_weights(
            module,
            folder,
            names,
            self.device,
            self.dtype,
            self.on_bytes,
            prefix,
            unread,
            load_format=self.load_format,
            variant=self.variant,
            stems=TRANSFORMERS_STEMS,
            allocate=self.allocate,
        )
        self.modules.append(module)
