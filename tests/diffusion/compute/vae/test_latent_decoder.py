"""Number of pictures in a batch of the decoder, with a fake VAE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.compute.vae.memory import FakeMemory
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.vae import latent_decoder as pictures
from vllm_omni.diffusion.compute.vae.latent_decoder import LatentDecoder
from vllm_omni.diffusion.compute.vae.tile_choice import WHOLE_MARGIN, TileChoice
from vllm_omni.diffusion.compute.vae.tiles import Tiling

SCALE = 8
TILING = Tiling(64, 64, 48, 48)
SMALL, LARGE = (4, 6), (12, 12)
"""Height and width in latent pixels; the large picture has six times the area."""


class NotedVae:
    """A fake VAE that notes the shapes of its latents."""

    use_tiling = False

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.batches.append((len(latents), *latents.shape[-2:]))
        return (
            latents.mean(1, keepdim=True).expand(-1, 3, -1, -1).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3),
        )


def latents(sides: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Latents of pictures of one colour each, which identifies the picture."""
    return [torch.full((1, 4, *side), number / 10) for number, side in enumerate(sides)]


@pytest.mark.parametrize(
    ("one_at_a_time", "batches"),
    [
        (False, [(2, *SMALL), (1, *SMALL), (1, *LARGE), (1, *LARGE), (2, *SMALL)]),
        (True, [(1, *SMALL)] * 3 + [(1, *LARGE)] * 2 + [(1, *SMALL)] * 2),
    ],
)
def test_consecutive_pictures_of_one_size_are_a_batch_of_limited_pixels(
    one_at_a_time: bool, batches: list[tuple[int, ...]]
) -> None:
    two_small = 2 * SMALL[0] * SMALL[1] * SCALE**2 + 1
    vae, sides = NotedVae(), [SMALL] * 3 + [LARGE] * 2 + [SMALL] * 2
    decode = LatentDecoder(vae, lambda x: x, TILING, SCALE, one_at_a_time, DecodeGroup.alone(), two_small)
    made = decode(latents(sides))
    assert vae.batches == batches
    assert [tuple(p.pixels.shape) for p in made] == [(height * SCALE, width * SCALE, 3) for height, width in sides]
    colours = [round((number / 10 * 0.5 + 0.5) * 255) for number in range(len(sides))]
    assert [p.pixels.unique().tolist() for p in made] == [[colour] for colour in colours]


@pytest.mark.parametrize(("one_at_a_time", "calls"), [(False, [3]), (True, [1, 1, 1])])
def test_ranks_that_share_a_decode_decode_one_picture_at_a_time_on_request(
    monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool, calls: list[int]
) -> None:
    noted: list[int] = []

    class NotedSharing:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, latents: Sequence[Tensor], decode: Any) -> list[Tensor]:
            noted.append(len(latents))
            return [torch.zeros(1, 3, 8, 8) for _ in latents]

    monkeypatch.setattr(pictures, "SharedDecoder", NotedSharing)
    two_ranks = DecodeGroup((0, 1), 0, Counter())
    decode = LatentDecoder(NotedVae(), lambda x: x, TILING, SCALE, one_at_a_time, two_ranks)
    assert len(decode(latents([SMALL] * 3))) == 3
    assert noted == calls


@pytest.mark.parametrize(("room", "batches"), [(3, [3]), (2.5, [2, 1]), (1, [1, 1, 1]), (0.5, [1, 1, 1])])
def test_batches_shrink_to_the_free_memory(room: float, batches: list[int]) -> None:
    """A picture of one tile has nothing smaller: it is tried whatever is free."""
    vae, needed = NotedVae(), 10_000
    choice = TileChoice(lambda height, width, num_frames: needed)
    choice.watch(FakeMemory(int(room * WHOLE_MARGIN * needed) + 1), None)
    decode = LatentDecoder(vae, lambda x: x, TILING, SCALE, False, DecodeGroup.alone(), choice=choice)
    made = decode(latents([SMALL] * 3))
    assert [size for size, *_ in vae.batches] == batches
    assert [picture.is_tiled for picture in made] == [False] * 3


def test_a_batch_that_runs_out_of_memory_is_decoded_picture_by_picture() -> None:
    class FullVae(NotedVae):
        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            if len(latents) > 1:
                raise torch.OutOfMemoryError("no room")
            return super().decode(latents, return_dict)

    vae, memory, choice = FullVae(), FakeMemory(0), TileChoice()
    choice.watch(memory, None)
    made = LatentDecoder(vae, lambda x: x, TILING, SCALE, False, DecodeGroup.alone(), choice=choice)(
        latents([SMALL] * 3)
    )
    assert [(size, picture.is_tiled) for (size, *_), picture in zip(vae.batches, made, strict=True)] == [(1, False)] * 3
    assert memory.num_releases == 1


def test_other_errors_are_not_tried_again() -> None:
    class BrokenVae(NotedVae):
        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            super().decode(latents, return_dict)
            raise RuntimeError("poisoned")

    vae = BrokenVae()
    with pytest.raises(RuntimeError, match="poisoned"):
        LatentDecoder(vae, lambda x: x, TILING, SCALE, False, DecodeGroup.alone())(latents([(100, 4)]))
    assert len(vae.batches) == 1
