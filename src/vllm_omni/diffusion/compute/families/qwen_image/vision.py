"""Qwen-Image-Edit's text encoder: all of Qwen2.5-VL but the scores over the vocabulary.

Ranks share the language model as in `text`; the vision tower, a tenth of its size, is on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.edit import (
    EDIT_TEMPLATE,
    IMAGE_TOKEN,
    NUM_EDIT_TEMPLATE_TOKENS,
    EditInput,
)
from vllm_omni.diffusion.compute.families.qwen_image.text import load_text_model
from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.inputs.images import InputImage

VISION_CACHE_BYTES = 256 * 2**20


class QwenImageEditEncoder:
    """Encodes a prompt together with the pictures that it edits."""

    def __init__(self, path: Path, edit: EditInput, reader: WeightReader, group: Group) -> None:
        """edit: rules of the model for its input pictures. For the rest see `text.QwenImageTextEncoder`."""
        self._edit = edit
        self._device = reader.device
        self._dtype = reader.dtype
        self._tokenizer = load_tokenizer(path / "tokenizer")
        self._image_token = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._model = load_text_model(path / "text_encoder", reader, group)
        self._tower = _load_vision_tower(path / "text_encoder", reader)
        self.features: PromptCache[InputImage] = PromptCache(self._see, VISION_CACHE_BYTES, lambda image: image.digest)
        """Embeddings of pictures."""

    def __call__(self, prompt: str, images: Sequence[InputImage]) -> Tensor:
        """Last hidden states [tokens, hidden size] of pictures and prompt, without the beginning of the template.

        All ranks of the group must call with the same arguments; each gets the states.
        """
        features = [self.features(image) for image in images]
        grids = [self._edit.vision_grid(image) for image in images]
        text = EDIT_TEMPLATE.format(self._edit.written([len(f) for f in features], prompt))
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        # A prompt may contain the token too; the template's come first.
        is_image = (places := ids[0] == self._image_token) & (places.cumsum(0) <= sum(map(len, features)))
        embedded = self._model.embed_tokens(to_device(ids, self._device))
        if features:
            embedded[0].index_copy_(0, to_device(is_image.nonzero()[:, 0], self._device), torch.cat(features))
        positions = to_device(vision_positions(is_image, grids)[:, None], self._device)
        output = self._model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states[0, NUM_EDIT_TEMPLATE_TOKENS:]

    def _see(self, image: InputImage) -> Tensor:
        """Embeddings [tokens, hidden size] of a picture."""
        inputs = self._edit.processor(images=[image.condition], return_tensors="pt")
        pixels = to_device(inputs["pixel_values"].to(self._dtype), self._device)
        # Every layer reads the window bounds on the host, so they stay there; index tensors go to the device.
        grid, tower = inputs["image_grid_thw"], self._tower
        window_index, cu_window_seqlens = get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        features: Tensor = tower(
            pixels,
            grid_thw=grid,
            position_ids=to_device(get_vision_position_ids(grid, tower.spatial_merge_size), self._device),
            window_index=to_device(window_index, self._device),
            cu_window_seqlens=cu_window_seqlens,
        ).pooler_output
        return features


def vision_positions(is_image: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Frame, row and column of each token for the language model's RoPE: int64 [3, tokens].

    is_image: bool [tokens]; grids: rows and columns of the pictures in order. A text token advances all three by one; a
    picture starts at the current position and advances it by its longer side (Qwen2-VL, arXiv 2409.12191).
    """
    parts: list[Tensor] = []
    begin = position = 0
    starts = is_image.nonzero()[:, 0].tolist()
    for rows, columns in grids:
        start = starts[0]
        starts = starts[rows * columns :]
        parts.append(torch.arange(position, position + start - begin).expand(3, -1))
        position += start - begin
        grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns))
        parts.append(grid.T + position)
        position += max(rows, columns)
        begin = start + rows * columns
    parts.append(torch.arange(position, position + len(is_image) - begin).expand(3, -1))
    return torch.cat(parts, dim=1)


def _load_vision_tower(folder: Path, reader: WeightReader) -> Qwen2_5_VisionTransformerPretrainedModel:
    config = Qwen2_5_VLConfig.from_pretrained(folder).vision_config
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    # Checkpoints have one of two names for the same module.
    has_long_names = any(name.startswith("model.visual.") for name in reader.names(folder))
    reader.load(tower, folder, {}, "model.visual." if has_long_names else "visual.")
    # Frequencies are not weights: they stay in float32, whatever the model's dtype.
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config).to(reader.device)
    return tower
