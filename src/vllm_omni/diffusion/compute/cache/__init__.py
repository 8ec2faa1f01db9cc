"""Step caches: each is one module, registered by its name in `data.CacheBackend`. See docs/adding_a_cache.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_omni.diffusion.compute.cache.base import NoCache, StepCache
from vllm_omni.diffusion.compute.cache.config import StepCacheConfig

if TYPE_CHECKING:
    from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
    from vllm_omni.diffusion.compute.distributed.groups import Group


def create_step_cache(config: StepCacheConfig | None, info: PackedModelInfo, rank_group: Group) -> StepCache:
    """Step cache of an accepted config, or one that computes all. rank_group: ranks that share sequences."""
    return NoCache(rank_group) if config is None else config.create(info, rank_group)
