"""Wan 2.1 and 2.2: the computation of diffusers' WanPipeline and WanImageToVideoPipeline on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.compute.attention.static_keys import StaticKeys
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline, Forward
from vllm_omni.diffusion.compute.families.flow_state import Branch, FlowState
from vllm_omni.diffusion.compute.families.wan.config import PATCH_SIZE, WanConfig, WanPipelineConfig
from vllm_omni.diffusion.compute.families.wan.image import WanImageEncoder
from vllm_omni.diffusion.compute.families.wan.text import WanTextEncoder
from vllm_omni.diffusion.compute.families.wan.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    IMAGE,
    TEXT,
    WanTransformer,
)
from vllm_omni.diffusion.compute.families.wan.vae import ConditioningVideo, WanDecoder, WanEncoder
from vllm_omni.diffusion.compute.offload.turns import IMAGE_ENCODER, TEXT_ENCODER, VAE
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.sampling import combine_bounded, draw_noise, pack_latents
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import StepContext
from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import InputImage

PROMPT_CACHE_BYTES = 256 * 2**20
PICTURE_CACHE_BYTES = 256 * 2**20
CLIP_CACHE_BYTES = 32 * 2**20
MODULATION_BYTES = 2**28
PICTURE_DTYPE = torch.float32
"""Type of the VAE and of CLIP beside a transformer of any type, as in the published examples."""


class PaddedPrompt(NamedTuple):
    """A prompt and the number of its tokens with padding, or after it was cut."""

    prompt: str
    num_tokens: int


class GivenPictures(NamedTuple):
    """Input of the VAE's encoder. The pictures have the size of the video."""

    images: tuple[InputImage, ...]
    num_frames: int
    """Frames of the video that is encoded."""

    def key(self) -> Hashable:
        return (*digests(self.images), self.num_frames)


@dataclass(eq=False)
class WanState(FlowState):
    """latents: float32 [frames * rows * columns, channels * 4], whatever the model's dtype. text: without tokens."""

    static_keys: tuple[tuple[dict[str, StaticKeys], ...], ...] = ()
    """For each transformer and guidance branch, by name: keys and values of the text, and of the input pictures."""
    given: Tensor | None = None
    """Tokens of the input pictures: [tokens, channels] beside the latents, or those of the first frame in its place."""
    encoding: ConditioningVideo | None = None
    """Encode of the input pictures that is under way, piece by piece."""

    @property
    def num_given(self) -> int:
        return 0 if self.given is None else len(self.given)


class WanPipeline(FlowPipeline[WanState, WanTransformer, Forward[WanTransformer]]):
    adapter_converter = "WanLoraLoaderMixin"
    kept_bytes = MODULATION_BYTES + PROMPT_CACHE_BYTES + PICTURE_CACHE_BYTES + CLIP_CACHE_BYTES
    shifts_by_size = False

    def __init__(
        self,
        loader: ComponentLoader,
        config: WanPipelineConfig,
        transformers: Sequence[WanTransformer],
        vae: AutoencoderKLWan,
        text_encoder: WanTextEncoder,
        image_encoder: WanImageEncoder | None,
    ) -> None:
        """image_encoder: makes embeddings of input pictures; None: the transformers do not see any."""
        decoder = WanDecoder(vae, loader.config.vae_use_tiling, loader.mesh.vae, loader.tile_choice)
        super().__init__(loader, transformers, decoder, MODULATION_BYTES)
        self._config = config
        self._num_channels: int = vae.config.z_dim
        self._encoder = WanEncoder(vae, loader.tile_choice)
        turns = self.turns
        self._given_tokens = loader.prompt_cache(
            turns.during(VAE, self._encode_given), PICTURE_CACHE_BYTES, GivenPictures.key
        )
        self._encodings: WeakValueDictionary[Hashable, ConditioningVideo] = WeakValueDictionary()
        """Encodes that are under way for running requests, by the key of their pictures."""
        self._seen: PromptCache[Sequence[InputImage]] | None = None
        """CLIP's embeddings of input pictures; None: the transformers do not see any."""
        if image_encoder is not None:
            self._seen = loader.prompt_cache(turns.during(IMAGE_ENCODER, image_encoder), CLIP_CACHE_BYTES, digests)
        encode_text = turns.during(TEXT_ENCODER, lambda padded: text_encoder(*padded))
        self._prompts: PromptCache[PaddedPrompt] = loader.prompt_cache(encode_text, PROMPT_CACHE_BYTES)
        self._shares_keys = loader.mesh.tensor.size == loader.mesh.text_encoder.size == 1
        self._static_keys: WeakValueDictionary[Any, StaticKeys] = WeakValueDictionary()
        """By transformer and input, of the running requests: those with the same text share them."""

    @classmethod
    def build(cls, loader: ComponentLoader) -> WanPipeline:
        path = loader.info.path
        config = WanPipelineConfig.from_dict(read_config(path, "", MODEL_INDEX))
        text_encoder = loader.text_encoder(WanTextEncoder)
        vae = loader.autoencoder(AutoencoderKLWan, PICTURE_DTYPE)
        if loader.info.image_input is None:
            vae.encoder = torch.nn.Identity()  # frees its weights
        sizes = WanConfig.from_dict(read_config(path, "transformer"))
        image_encoder = loader.image_encoder(WanImageEncoder, PICTURE_DTYPE) if sizes.sees_image else None
        transformers = [
            loader.transformer(partial(WanTransformer, sizes), CHECKPOINT_NAMES, FLOAT8_LAYERS, component)
            for component in config.transformers
        ]
        return cls(loader, config, transformers, vae.to(loader.device), text_encoder, image_encoder)

    @classmethod
    def gains_from_compiling(cls, config: OmniDiffusionConfig) -> bool:
        # The fused kernels leave nothing to compile, nor do exchanges in every part of a block.
        return config.kernels == "torch" and config.parallel.tensor_parallel_size == 1

    @property
    def early_encodes(self) -> Sequence[Callable[[DiffusionRequest], object]]:
        return self._encode_texts, self._see, self._encode_pictures

    def _encode_texts(self, request: DiffusionRequest) -> None:
        for prompt in self._padded_prompts(request):
            self._prompts(prompt)

    def _see(self, request: DiffusionRequest) -> None:
        if self._seen is not None:
            self._seen(request.images)

    def _encode_pictures(self, request: DiffusionRequest) -> None:
        if request.images and self._info.num_encoded_frames(request.images, request.num_frames) == 1:
            self._given_tokens(self._pictures(request))

    def encode(self, request: DiffusionRequest) -> WanState:
        return self._state(request, self._given_tokens(self._pictures(request)) if request.images else None)

    def begin_encode(self, request: DiffusionRequest) -> WanState:
        assert not self._config.expand_timesteps, "a first frame alone is encoded whole"
        return self._state(request, None)

    def encode_next(self, state: WanState, frames: range) -> None:
        if state.given is not None:
            return
        pictures = self._pictures(state.request)
        if frames.stop == state.grid[0] or pictures in self._given_tokens:
            state.given, state.encoding = self._given_tokens(pictures), None
        else:
            state.encoding = self._encoding(pictures)
            with self.turns.use(VAE):
                state.encoding.advance(frames.stop)

    def _state(self, request: DiffusionRequest, given: Tensor | None) -> WanState:
        """State before the first step. given: see `WanState`."""
        shape = self._num_channels, *self._latent_shape(request)
        noise = draw_noise(shape, request.seed, torch.float32, self._device)
        prompts = self._padded_prompts(request)
        static_keys = tuple(
            tuple(self._keys(index, prompt, request) for prompt in prompts) for index in range(len(self.transformers))
        )
        text = torch.empty((0, self.transformer.config.dim), dtype=self._dtype, device=self._device)
        return self.new_state(
            WanState,
            request,
            (text,) * len(prompts),
            to_tokens(noise),
            static_keys=static_keys,
            given=given,
        )

    @staticmethod
    def _padded_prompts(request: DiffusionRequest) -> list[PaddedPrompt]:
        return [PaddedPrompt(prompt, request.max_sequence_length) for prompt in request.branch_prompts]

    def _latent_shape(self, request: DiffusionRequest) -> tuple[int, int, int]:
        """Latent frames, and rows and columns of latent pixels."""
        frames, rows, columns = self.grid(request)
        return frames, PATCH_SIZE * rows, PATCH_SIZE * columns

    def _keys(self, index: int, prompt: PaddedPrompt, request: DiffusionRequest) -> dict[str, StaticKeys]:
        """Keys of one branch's text, and of what the transformer sees of the input pictures, if it sees any."""
        transformer, seen, images = self.transformers[index], self._seen, request.images
        composition = self._adapters.composition(request)

        def text_keys() -> StaticKeys:
            states = self._prompts(prompt)
            with self.transformer_turn(index), self.adapted(request, index):
                return transformer.text_keys(states, prompt.num_tokens)

        keys = {TEXT: self._shared((index, composition, prompt), text_keys)}
        if seen is not None:

            def image_keys() -> StaticKeys:
                states = seen(images).to(self._dtype)
                with self.transformer_turn(index), self.adapted(request, index):
                    return transformer.image_keys(states)

            keys[IMAGE] = self._shared((index, composition, *digests(images)), image_keys)
        return keys

    def _shared(self, key: Hashable, make: Callable[[], StaticKeys]) -> StaticKeys:
        """Keys that a running request has, or new ones."""
        # Objects may live longer on one rank than on another, for example in a traceback. Where ranks exchange tensors
        # to make keys, all must make them.
        made = self._static_keys.get(key) if self._shares_keys else None
        if made is None:
            made = self._static_keys[key] = make()
        return made

    def _pictures(self, request: DiffusionRequest) -> GivenPictures:
        return GivenPictures(request.images, 1 if self._config.expand_timesteps else request.num_frames)

    def _encoding(self, given: GivenPictures) -> ConditioningVideo:
        """Encode of these pictures that is under way for a running request, or a new one."""
        encoding = self._encodings.get(given.key())
        if encoding is None:
            pictures = (image.reference for image in given.images)
            encoding = self._encodings[given.key()] = ConditioningVideo(self._encoder, given.num_frames, *pictures)
        return encoding

    def _encode_given(self, given: GivenPictures) -> Tensor:
        latents = self._encoding(given).finish()
        if self._config.expand_timesteps:
            return to_tokens(latents)
        is_given = torch.zeros((self._frame_multiple, *latents.shape[1:]))
        is_given[:, 0] = 1
        if len(given.images) > 1:
            is_given[-1, -1] = 1
        return to_tokens(torch.cat((to_device(is_given, self._device), latents)))

    @property
    def _frame_multiple(self) -> int:
        multiple = self._info.frame_multiple
        assert multiple is not None, "the family makes videos"
        return multiple

    def transformer_index(self, state: WanState) -> int:
        ratio = self._config.boundary_ratio
        if ratio is None:
            return 0
        return int(state.timesteps[state.step] < ratio * state.scheduler.config.num_train_timesteps)

    def image_tokens(self, state: WanState) -> Tensor:
        if state.given is None or self._config.expand_timesteps:
            return self._with_given(state, state.latents)
        return torch.cat((state.latents, state.given), dim=1)

    def further_conditions(self, state: WanState) -> tuple[float, ...]:
        # A given first frame has no noise.
        return (0.0,) if self._config.expand_timesteps and state.given is not None else ()

    def rotations(self, state: WanState, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        of_image = self.transformer.rotations(state.grid)
        return of_image[:num_text_tokens], of_image

    def lay_out(
        self, branches: Sequence[Branch], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> Forward[WanTransformer]:
        states = [branch.state for branch in branches]
        index = self.transformer_index(states[0])
        keys = [branch.state.static_keys[index][branch.number] for branch in branches]
        is_given = [sharding.part(torch.arange(state.num_tokens) < state.num_given) for state in states]
        image_rows = self.rows_of_tokens(branches, is_given, pack)
        static_keys = {name: [its[name] for its in keys] for name in keys[0]}
        arrangement = Arrangement(pack, rotations, self._attention, image_rows, static_keys)
        return Forward(self.transformers[index], arrangement, text)

    def embed(self, latents: Tensor, context: StepContext, forward: Forward[WanTransformer]) -> Hidden:
        return forward.transformer.embed(latents, forward.text)

    def project(self, hidden: Hidden, context: StepContext, forward: Forward[WanTransformer]) -> Tensor:
        return forward.transformer.project(hidden, context)

    def combine(self, state: WanState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0]
        request = state.request
        scale = request.guidance_scale_2 if self.transformer_index(state) else None
        return combine_bounded(branches[0], branches[1], request.true_cfg_scale if scale is None else scale, 0)

    def advance(self, state: WanState, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        clean = super().advance(state, branches, previews)
        if state.step == len(state.timesteps):
            state.latents = self._with_given(state, state.latents)
        return clean

    def predict_clean(self, state: WanState, velocity: Tensor) -> Tensor:
        return self._with_given(state, super().predict_clean(state, velocity))

    def _with_given(self, state: WanState, latents: Tensor) -> Tensor:
        """Latents whose first frame is the given one, where a model keeps it."""
        if state.given is None or not self._config.expand_timesteps:
            return latents
        return torch.cat((state.given, latents[state.num_given :]))


def digests(images: Sequence[InputImage]) -> tuple[str, ...]:
    return tuple(image.digest for image in images)


def to_tokens(latents: Tensor) -> Tensor:
    """[channels, frames, height, width] -> [frames * height / 2 * width / 2, channels * 4]."""
    return torch.cat([pack_latents(frame) for frame in latents.unbind(1)])
