"""A GPU that is not there: its tensors are computed on the CPU, and whoever makes the host wait for it is caught.

Tensors on `FAKE_GPU` are of a device type of their own. Within `FakeGpu` operations on them run on the CPU tensors that
they hold, under the rules of a GPU: no operation takes tensors of the host, single numbers excepted, and what would let
the host wait raises HostWaitsError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.kinds import CPU

if torch.cuda.is_available():
    # A process has one kind of accelerator; the real one is asked in tests/gpu.
    pytest.skip("fakes a GPU where there is none", allow_module_level=True)


class _Module(_DummyBackendModule):
    """To whoever asks for the machine's accelerators."""

    def is_available(self) -> bool:
        return False


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("fakegpu", _Module(), _Hook())
FAKE_GPU = torch.device("fakegpu", 0)
READS = {
    *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "bincount"),
    *("nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim"),
}
"""Operations whose result, or its shape, the host must know."""
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = ("to", "_to_copy")


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


class FakeTensor(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeTensor:
        tensor: FakeTensor = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=FAKE_GPU
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of a FakeGpu")


class FakeGpu(TorchDispatchMode):
    """See the module. `waiting_allowed`: for the time of loading."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operations = 0
        self.num_uploads = 0
        self._may_wait = False

    def __enter__(self) -> FakeGpu:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) is seen to copy
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._before)

    @contextmanager
    def waiting_allowed(self) -> Iterator[None]:
        self._may_wait = True
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved tensor has another class then
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            self._may_wait = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        hosts = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
        target = next((x for x in leaves if isinstance(x, torch.device)), None)
        if name == "pin_memory":
            return _pinned(args[0].clone())
        if not self._may_wait:
            _check(name, args, kwargs, fakes, hosts, target)
        is_pinned = kwargs.pop("pin_memory", False)
        goes_to_gpu = target is not None and target.type == FAKE_GPU.type
        arguments = tree_map_only(FakeTensor, lambda x: x.held, (args, kwargs))
        arguments = tree_map_only(
            torch.device, lambda d: torch.device(CPU) if d.type == FAKE_GPU.type else d, arguments
        )
        out = func(*arguments[0], **arguments[1])
        if not fakes and not goes_to_gpu:
            return _pinned(out) if is_pinned else out
        self.num_operations += 1
        self.num_uploads += not fakes and name in COPIES
        if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        if target is not None and not goes_to_gpu and target.type != "meta":
            return out.clone() if name in COPIES else out
        return tree_map_only(Tensor, FakeTensor, out)


def _check(
    name: str, args: Any, kwargs: Mapping[str, Any], fakes: list[FakeTensor], hosts: list[Tensor], target: Any
) -> None:
    if name in COPIES and not fakes and target is not None and target.type == FAKE_GPU.type:
        if not (kwargs.get("non_blocking") and hasattr(hosts[0], "is_fake_pinned")):
            raise HostWaitsError("a copy to the device, from memory that is not pinned or blocking")
        return
    if name in COPIES and fakes and target is not None and target.type != FAKE_GPU.type:
        raise HostWaitsError("a copy to the host")
    if name == "copy_" and fakes and hosts:
        is_async = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
        if not (is_async and hasattr(hosts[0], "is_fake_pinned")):
            raise HostWaitsError("a copy between host and device, of memory that is not pinned or blocking")
        return
    if not fakes:
        return
    if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(fakes) > 1):
        raise HostWaitsError(f"{name} reads from the device")
    indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)] if name in BY_INDEX else []
    if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
        raise HostWaitsError(f"{name} by a mask reads from the device")
    if mixed := [x for x in hosts if x.dim() > 0]:
        raise HostWaitsError(f"{name} on the device takes a tensor of the host, {tuple(mixed[0].shape)}")


def _pinned(tensor: Tensor) -> Tensor:
    tensor.is_fake_pinned = True  # type: ignore[attr-defined]
    return tensor


class FakeGpuDevice(Device):
    """A worker's device, for a runner whose steps run within a FakeGpu."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.torch = FAKE_GPU

    def download(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
        buffers = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for name, x in tensors.items()}
        for name, x in tensors.items():
            buffers[name].copy_(x, non_blocking=True)
        return lambda: {name: buffer.numpy() for name, buffer in buffers.items()}
