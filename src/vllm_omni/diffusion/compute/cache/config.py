"""Settings of a step cache. Plain Python: the front end checks settings without PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_omni.diffusion.data import fit_fields, require, require_at_least
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
    from vllm_omni.diffusion.compute.cache.base import StepCache
    from vllm_omni.diffusion.compute.distributed.groups import Group


@dataclass(frozen=True)
class StepCacheConfig(ABC):
    """Settings of one step cache: each field is a key of `--cache-config`, with its default.

    A subclass checks values in `__post_init__`, after `super().__post_init__()`. The first line of its docstring
    describes the cache in README's table. Raises ConfigError with the key, the value and what is accepted.
    """

    def __post_init__(self) -> None:
        fit_fields(self, cache_key)

    @classmethod
    def key_aliases(cls) -> Mapping[str, str]:
        """Other accepted spellings of keys -> field names."""
        return {}

    @abstractmethod
    def check_model(self, info: PackedModelInfo) -> None:
        """Raise ConfigError if the cache cannot serve this model with these settings."""

    @abstractmethod
    def create(self, info: PackedModelInfo, rank_group: Group) -> StepCache:
        """Cache for an accepted model. rank_group: the ranks that compute the same sequences."""

    def _require(self, condition: bool, name: str, accepted: str) -> None:
        require(condition, cache_key(name), getattr(self, name), accepted)

    def _require_at_least(self, least: int, name: str) -> None:
        require_at_least(least, getattr(self, name), cache_key(name))

    def _refuse_useless(self, name: str, reason: str) -> None:
        """Raise ConfigError for a setting that changes nothing beside the other settings."""
        value = getattr(self, name)
        value = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{cache_key(name)} {value!r} has no effect {reason}")

    def _is_changed(self, name: str) -> bool:
        """Whether a field's value is not the default."""
        return bool(getattr(self, name) != getattr(type(self), name))


def cache_key(name: str) -> str:
    """Name of a setting in error messages."""
    return f"--cache-config: {name}"
