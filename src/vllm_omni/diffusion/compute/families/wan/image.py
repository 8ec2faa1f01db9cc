"""CLIP's embeddings of the input pictures, to which the image-to-video models of Wan 2.1 attend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.families.wan.config import CLIP_ANCHOR
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.inputs.images import InputImage


class WanImageEncoder:
    """CLIP's vision tower without its last layer, which is not read."""

    def __init__(self, path: Path, reader: WeightReader) -> None:
        """Read the weights in the model folder `path`.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = reader.device
        self._dtype = reader.dtype
        self._processor = CLIPImageProcessorPil.from_pretrained(path / "image_processor")
        folder = path / "image_encoder"
        config = CLIPVisionConfig.from_pretrained(folder)
        with torch.device("meta"):
            tower = CLIPVisionModel(config)
            tower.encoder.layers = tower.encoder.layers[:-1]
            tower.post_layernorm = nn.Identity()
        # Releases of transformers differ in the prefix.
        names = reader.names(folder)
        prefix = next((name.removesuffix(CLIP_ANCHOR) for name in names if name.endswith(CLIP_ANCHOR)), "")
        unread = (f"encoder.layers.{config.num_hidden_layers - 1}.", "post_layernorm.", "embeddings.position_ids")
        reader.load(tower, folder, {}, prefix, unread)
        # Positions are no weight.
        tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions, device=reader.device)[None]
        self._tower = tower

    def __call__(self, images: Sequence[InputImage]) -> Tensor:
        """Embeddings [tokens, hidden size] after the last layer but one, one picture after the other."""
        pictures = [Image.fromarray(image.condition) for image in images]
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        states: Tensor = self._tower(to_device(pixels.to(self._dtype), self._device)).last_hidden_state
        return states.flatten(0, 1)
