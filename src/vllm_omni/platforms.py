"""The kind of device of this machine, under the import path of the public vllm-omni package."""

from __future__ import annotations

from argparse import ArgumentParser


class Platform:
    """The device that models run on by default (`device="auto"`)."""

    @property
    def device_type(self) -> str:
        """`cuda` where PyTorch sees such a device, otherwise `cpu`."""
        from vllm_omni.diffusion.compute.device.kinds import kind_of  # imports PyTorch

        return kind_of("auto")

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_npu(self) -> bool:
        return False

    def pre_register_and_update(self, parser: ArgumentParser | None = None) -> None:
        """Leave `parser` as it is: no device here has flags of its own."""


current_omni_platform = Platform()
