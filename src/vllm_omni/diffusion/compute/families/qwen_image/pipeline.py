"""Qwen-Image and Qwen-Image-Edit: the computation of diffusers' QwenImagePipeline, QwenImageEditPipeline and
QwenImageEditPlusPipeline on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline, Forward
from vllm_omni.diffusion.compute.families.flow_state import Branch, FlowState
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.qwen_image.edit import EditInput
from vllm_omni.diffusion.compute.families.qwen_image.text import QwenImageTextEncoder
from vllm_omni.diffusion.compute.families.qwen_image.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    QwenImageTransformer,
)
from vllm_omni.diffusion.compute.families.qwen_image.vae import QwenImageDecoder, QwenImageEncoder
from vllm_omni.diffusion.compute.families.qwen_image.vision import QwenImageEditEncoder
from vllm_omni.diffusion.compute.offload.turns import TEXT_ENCODER, VAE
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.sampling import combine_guidance, draw_noise, pack_latents
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import StepContext
from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import InputImage

PROMPT_CACHE_BYTES = 256 * 2**20
REFERENCE_CACHE_BYTES = 64 * 2**20
MODULATION_BYTES = 2**30


class Instruction(NamedTuple):
    """Input of the text encoder."""

    prompt: str
    images: tuple[InputImage, ...]

    def key(self) -> tuple[str, ...]:
        """Cache key, without the pixels."""
        return self.prompt, *(image.digest for image in self.images)


@dataclass(eq=False)
class QwenImageState(FlowState):
    """State of a Qwen-Image request. latents: [rows * columns, in_channels]."""

    reference_grids: tuple[tuple[int, int], ...] = ()
    """Rows and columns of tokens of each reference picture."""
    references: Tensor | None = None
    """Clean latents of the reference pictures, [tokens, in_channels]: further image tokens of every branch."""

    @property
    def num_image_tokens(self) -> int:
        return self.num_tokens + (0 if self.references is None else len(self.references))


@dataclass(frozen=True)
class QwenImageForward(Forward[QwenImageTransformer]):
    """Tensors that the steps of some sequences share."""

    targets: Tensor | None
    """int64 [velocity tokens]: positions of the image tokens of pictures, not of references; None: all are."""


class QwenImagePipeline(FlowPipeline[QwenImageState, QwenImageTransformer, QwenImageForward]):
    adapter_converter = "QwenImageLoraLoaderMixin"
    kept_bytes = MODULATION_BYTES + PROMPT_CACHE_BYTES + REFERENCE_CACHE_BYTES

    def __init__(
        self,
        loader: ComponentLoader,
        transformer: QwenImageTransformer,
        decoder: QwenImageDecoder,
        encode_text: Callable[[Instruction], Tensor],
        encoder: QwenImageEncoder | None,
    ) -> None:
        """encoder: makes latents of input pictures; None: the model takes none."""
        super().__init__(loader, [transformer], decoder, MODULATION_BYTES)
        turns = self.turns
        self._prompts = loader.prompt_cache(
            turns.during(TEXT_ENCODER, encode_text), PROMPT_CACHE_BYTES, Instruction.key
        )
        self._references: PromptCache[InputImage] | None = None
        """Latents of input pictures; None: the model takes none."""
        if encoder is not None:
            encode_image = turns.during(VAE, lambda image: encoder(image.reference))
            self._references = loader.prompt_cache(encode_image, REFERENCE_CACHE_BYTES, lambda image: image.digest)

    @classmethod
    def build(cls, loader: ComponentLoader) -> QwenImagePipeline:
        encode_text = _load_text_encoder(loader)
        vae = loader.autoencoder(AutoencoderKLQwenImage)
        takes_images = loader.info.image_input is not None
        if not takes_images:
            vae.encoder = torch.nn.Identity()  # frees its weights
        vae.to(loader.device)
        config = QwenImageConfig.from_dict(read_config(loader.info.path, "transformer"))
        transformer = loader.transformer(partial(QwenImageTransformer, config), CHECKPOINT_NAMES, FLOAT8_LAYERS)
        encoder = QwenImageEncoder(vae, loader.tile_choice) if takes_images else None
        slicing, tiling = loader.config.vae_use_slicing, loader.config.vae_use_tiling
        decoder = QwenImageDecoder(vae, slicing, tiling, loader.mesh.vae, loader.tile_choice)
        return cls(loader, transformer, decoder, encode_text, encoder)

    @classmethod
    def gains_from_compiling(cls, config: OmniDiffusionConfig) -> bool:
        # The fused kernels leave nothing to compile.
        return config.kernels == "torch"

    @property
    def early_encodes(self) -> Sequence[Callable[[DiffusionRequest], object]]:
        return self._encode_texts, lambda request: self._encode_images(request.images)

    def encode(self, request: DiffusionRequest) -> QwenImageState:
        states = self._encode_texts(request)
        with self.transformer_turn(), self.adapted(request):
            text = tuple(map(self.transformer.embed_text, states))
        _, rows, columns = self.grid(request)
        channels = self.transformer.config.in_channels // 4
        noise = draw_noise((channels, 2 * rows, 2 * columns), request.seed, self._dtype, self._device)
        side, reference_sizes = self._info.pixels_per_token, [image.reference.shape[:2] for image in request.images]
        return self.new_state(
            QwenImageState,
            request,
            text,
            pack_latents(noise),
            reference_grids=tuple((height // side, width // side) for height, width in reference_sizes),
            references=self._encode_images(request.images),
        )

    def timesteps(self, scheduler: Any) -> tuple[float, ...]:
        return tuple((scheduler.timesteps.to(self._dtype) / 1000).tolist())

    def _encode_texts(self, request: DiffusionRequest) -> list[Tensor]:
        return [self._encode_text(request, prompt) for prompt in request.branch_prompts]

    def _encode_text(self, request: DiffusionRequest, prompt: str) -> Tensor:
        """Output of the text encoder for one prompt and the pictures to edit: [tokens, joint_attention_dim]."""
        states = self._prompts(Instruction(prompt, request.images))
        # As in diffusers, a prompt with pictures is not cut.
        return states if request.images else states[: request.max_sequence_length]

    def _encode_images(self, images: Sequence[InputImage]) -> Tensor | None:
        """Latents of the pictures to edit: [reference tokens, in_channels]; None without pictures."""
        if not images:
            return None
        assert self._references is not None, "a model that takes no input pictures was sent some"
        return torch.cat([self._references(image) for image in images])

    def image_tokens(self, state: QwenImageState) -> Tensor:
        return state.latents if state.references is None else torch.cat((state.latents, state.references))

    def further_conditions(self, state: QwenImageState) -> tuple[float, ...]:
        # References are modulated at timestep 0.
        return (0.0,) if self.transformer.config.zero_cond_t and state.references is not None else ()

    def rotations(self, state: QwenImageState, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        return self.transformer.rotations(num_text_tokens, (state.grid[1:], *state.reference_grids))

    def lay_out(
        self, branches: Sequence[Branch], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> QwenImageForward:
        states = [branch.state for branch in branches]
        marks = [sharding.part(torch.arange(state.num_image_tokens) >= state.num_tokens) for state in states]
        image_rows, targets = self.rows_of_tokens(branches, marks, pack), None
        if (is_reference := torch.cat(marks)).any():
            targets = to_device((~is_reference).nonzero()[:, 0], self._device)
        arrangement = Arrangement(pack, rotations, self._attention, image_rows)
        return QwenImageForward(self.transformer, arrangement, text, targets)

    def embed(self, latents: Tensor, context: StepContext, forward: QwenImageForward) -> Hidden:
        return forward.transformer.embed(latents, forward.text)

    def project(self, hidden: Hidden, context: StepContext, forward: QwenImageForward) -> Tensor:
        return forward.transformer.project(hidden, context, forward.targets)

    def combine(self, state: QwenImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0]
        return combine_guidance(branches[0], branches[1], state.request.true_cfg_scale)


def _load_text_encoder(loader: ComponentLoader) -> Callable[[Instruction], Tensor]:
    edit = loader.info.image_input
    if edit is None:
        text_encoder = loader.text_encoder(QwenImageTextEncoder)
        return lambda instruction: text_encoder(instruction.prompt)
    assert isinstance(edit, EditInput)
    edit_encoder = loader.text_encoder(QwenImageEditEncoder, edit)
    loader.prompt_caches.append(edit_encoder.features)
    return lambda instruction: edit_encoder(*instruction)
