"""CLIP's embeddings of the input pictures, to which the image-to-video models of Wan 2.1 attend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from vllm_omni.diffusion.catalog.model_index import TRANSFORMERS_STEMS
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.families.wan.config import CLIP_ANCHOR
from vllm_omni.diffusion.compute.weights.loading import OnBytes, load_weights, weight_names
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.inputs.images import InputImage


class WanImageEncoder:
    """CLIP's vision tower without its last layer, which is not read."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: OnBytes = lambda count: None,
        load_format: LoadFormat = "auto",
        variant: str | None = None,
    ) -> None:
        """Read the weights in the model folder `path`; `on_bytes` is called with their size.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = device
        self._dtype = dtype
        self._processor = CLIPImageProcessorPil.from_pretrained(path / "image_processor")
        folder = path / "image_encoder"
        config = CLIPVisionConfig.from_pretrained(folder)
        with torch.device("meta"):
            tower = CLIPVisionModel(config)
            tower.encoder.layers = tower.encoder.layers[:-1]
            tower.post_layernorm = nn.Identity()
        names = weight_names(folder, variant, TRANSFORMERS_STEMS) if load_format == "auto" else ()
        # Releases of transformers differ in the prefix.
        prefix = next((name.removesuffix(CLIP_ANCHOR) for name in names if name.endswith(CLIP_ANCHOR)), "")
        load_weights(
            tower,
            folder,
            {},
            device,
            dtype,
            on_bytes,
            prefix,
            (f"encoder.layers.{config.num_hidden_layers - 1}.", "post_layernorm.", "embeddings.position_ids"),
            load_format=load_format,
            variant=variant,
            stems=TRANSFORMERS_STEMS,
        )
        # Positions are no weight.
        tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions, device=device)[None]
        self._tower = tower

    def __call__(self, images: Sequence[InputImage]) -> Tensor:
        """Embeddings [tokens, hidden size] after the last layer but one, one picture after the other."""
        pictures = [Image.fromarray(image.condition) for image in images]
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        states: Tensor = self._tower(to_device(pixels.to(self._dtype), self._device)).last_hidden_state
        return states.flatten(0, 1)
