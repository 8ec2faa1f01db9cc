"""The example cache of docs/adding_a_cache.md, registered as a newcomer would: a module and its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from vllm_omni.diffusion.data import STEP_CACHES

GUIDE = Path(__file__).parents[4] / "docs" / "adding_a_cache.md"
NAME = "interval"


def example_source() -> str:
    """The guide's first Python block: a whole module."""
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return blocks[0]


@contextmanager
def registered() -> Iterator[str]:
    """Name of the example cache, which is registered inside; ranks that `run_places` forks have it too."""
    path = f"vllm_omni.diffusion.compute.cache.{NAME}"
    module = sys.modules[path] = ModuleType(path)
    STEP_CACHES[NAME] = path
    try:
        exec(compile(example_source(), str(GUIDE), "exec", dont_inherit=True), module.__dict__)
        yield NAME
    finally:
        del STEP_CACHES[NAME], sys.modules[path]
