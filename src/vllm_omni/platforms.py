"""Kind of device of this machine, under the import path of the public vllm-omni package."""

from __future__ import annotations

from argparse import ArgumentParser


class Platform:
    """Device that models run on by default (`device="auto"`)."""

    @property
    def device_type(self) -> str:
        """`cuda` if PyTorch finds a CUDA device, otherwise `cpu`."""
        from vllm_omni.diffusion.compute.device.kinds import kind_of  # imports PyTorch

        return kind_of("auto")

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_npu(self) -> bool:
        return False

    def pre_register_and_update(self, parser: ArgumentParser | None = None) -> None:
        """Do nothing: no device here adds flags to `parser`."""


current_omni_platform = Platform()
