"""Fixture for tests that parse many command lines."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from vllm_omni.entrypoints.cli import args


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    """Build the parser once: its hundreds of flags take longer than a command line, and parsing does not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(args, "build_parser", functools.cache(args.build_parser))
        yield
