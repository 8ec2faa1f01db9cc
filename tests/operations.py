"""A count of the work of a call that is the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import vllm_omni

PACKAGE = str(Path(vllm_omni.__file__).parent)


@dataclass
class Operations:
    number: int = 0


@contextmanager
def counting_operations() -> Iterator[Operations]:
    """Counts the bytecode instructions of the package that this thread runs inside the block.

    Loops inside one instruction (`list(values)`) count as one.
    """
    operations = Operations()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        operations.number += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield operations
    finally:
        sys.settrace(before)
