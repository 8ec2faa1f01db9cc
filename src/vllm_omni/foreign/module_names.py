"""Names that modules of the public vllm-omni package have and ours do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def refuse_names(module: str, texts: Mapping[str, str], of_others: str | None = None) -> Callable[[str], Any]:
    """Make a `__getattr__` for `module` whose errors say what to use here.

    `texts`: name -> message of the ImportError. `of_others`: message for every other public name; None: Python's own
    AttributeError.
    """

    def getattr_(name: str) -> Any:
        text = texts.get(name, None if name.startswith("_") else of_others)
        if text is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(f"{module} has no {name}: {text}", name=module)

    return getattr_
