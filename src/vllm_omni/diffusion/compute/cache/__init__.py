"""Caches that skip blocks between steps. A new one is one module with `create`, and one line here."""

from __future__ import annotations

from importlib import import_module

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.cache.base import NoCache, StepCache
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.data import CacheConfig, CacheDiTConfig, TeaCacheConfig

_MODULES: dict[type[CacheConfig], str] = {TeaCacheConfig: "tea_cache", CacheDiTConfig: "cache_dit"}


def create_step_cache(config: CacheConfig | None, info: PackedModelInfo, rank_group: Group) -> StepCache:
    """The cache of a checked config (see `ModelInfo.check_cache`); None computes every block.

    rank_group: the ranks that compute the same sequences.
    """
    if config is None:
        return NoCache(rank_group)
    cache: StepCache = import_module(f"{__name__}.{_MODULES[type(config)]}").create(config, info, rank_group)
    return cache
