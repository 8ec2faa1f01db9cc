"""Fixtures that tests of several packages share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    # Read when Triton is first imported: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is first imported: threads would wait for those of the tests that run beside.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


TESTS = Path(__file__).parent

# HTTP clients read all certificate authorities of the world when they are made, which takes 30 ms. No test asks one.
os.environ.setdefault("SSL_CERT_DIR", str(TESTS))


LONGEST_FILES = {
    TESTS / name
    for name in (
        "benchmarks/test_gpu.py",
        "diffusion/compute/cache/test_company.py",
        "diffusion/compute/cache/test_families.py",
        "diffusion/compute/cache/test_guide_examples.py",
        "diffusion/compute/cache/test_layouts.py",
        "diffusion/compute/families/diffusers_fallback/test_adapter_names.py",
        "diffusion/compute/families/test_adapters.py",
        "diffusion/compute/families/test_compiled.py",
        "diffusion/compute/families/test_float8.py",
        "diffusion/compute/worker/test_layouts.py",
        "diffusion/compute/worker/test_no_waiting.py",
        "diffusion/compute/worker/test_rank_faults.py",
        "diffusion/control/executor/test_executors.py",
        "diffusion/control/executor/test_worker_groups.py",
        "entrypoints/cli/test_output.py",
        "entrypoints/cli/test_serve.py",
        "entrypoints/cli/test_serve_videos.py",
        "test_families.py",
        "test_omni.py",
        "video_jobs/service/test_processes.py",
    )
}
"""Files whose tests take longest together, in the default run or the thorough one."""
assert all(file.exists() for file in LONGEST_FILES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: one that begins last would run while the other processes have nothing to do."""
    items.sort(key=lambda item: item.path not in LONGEST_FILES)


def pytest_collection_finish() -> None:
    """Let garbage collections, and forks of this process, leave alone what the imports have made."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-Image model with 3 heads; pictures of 64x64 in 4 steps without guidance by default."""
    # Imported here: most tests need no torch.
    from testbed.tiny_models import build_tiny_qwen_image

    defaults: dict[str, object] = {"height": 64, "width": 64, "num_inference_steps": 4}
    path = tmp_path_factory.mktemp("models") / "tiny-qwen-image"
    return build_tiny_qwen_image(path, heads=3, default_sampling_params=defaults)


@pytest.fixture(scope="session")
def tiny_edit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-Image-Edit-2511 model with 3 heads, which takes several pictures of about 64x64; 4 steps."""
    from testbed.tiny_models import build_tiny_qwen_image

    return build_tiny_qwen_image(
        tmp_path_factory.mktemp("models") / "tiny-qwen-image-edit",
        edit="QwenImageEditPlusPipeline",
        zero_cond_t=True,
        default_sampling_params={"height": 64, "width": 64, "num_inference_steps": 4},
    )


def _on_one_thread() -> Iterator[None]:
    """Let PyTorch use one CPU thread, as each rank has: with more, convolutions round differently."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


one_thread = pytest.fixture(_on_one_thread, name="one_thread")
module_on_one_thread = pytest.fixture(_on_one_thread, name="module_on_one_thread", scope="module")
"""`one_thread` from the first test of a module to the last, for fixtures that all of them share."""
