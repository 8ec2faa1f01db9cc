"""Tiny random models that no packed family serves: Flux, Stable Diffusion 1, 3 and XL, what edits with them,
SkyReels and LTX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from testbed.tiny_models import randomize, tiny_tokenizer
from testbed.tiny_text_encoders import clip_encoder, clip_tokenizer, t5_encoder, t5_fields, t5_tokenizer
from testbed.tiny_whole_models import (
    cog_video_x,
    cog_view_4,
    hunyuan_dit,
    hunyuan_video_1_5,
    long_cat_image,
    mochi,
    sana,
    tiny_vae,
)
from testbed.tiny_z_image import CHAT_TEMPLATE


def build_tiny_diffusers(class_name: str, path: Path, **defaults: object) -> Path:
    """Write a folder of the pipeline `class_name` to `path` and return it; `defaults` over 64x64 pixels in 4 steps."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    pipeline = BUILDERS[class_name]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            randomize(component.eval())
    pipeline.save_pretrained(path)
    torch.set_rng_state(state)
    values = {"height": 64, "width": 64, "num_inference_steps": 4, **defaults}
    (path / "default_sampling_params.json").write_text(json.dumps(values))
    return path


def _flux() -> DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        tokenizer=clip,
        text_encoder=clip_encoder(clip, CLIPTextModel),
        tokenizer_2=t5,
        text_encoder_2=t5_encoder(t5, 32),
        vae=tiny_vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _flux_2_klein() -> DiffusionPipeline:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    text_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,  # the pipeline takes the 9th, the 18th and the 27th
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        latent_channels=16, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    return Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(text_config),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _stable_diffusion_3() -> DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=48,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        tokenizer=clip,
        text_encoder=clip_encoder(clip, CLIPTextModelWithProjection),
        tokenizer_2=clip,
        text_encoder_2=clip_encoder(clip, CLIPTextModelWithProjection),
        tokenizer_3=t5,
        text_encoder_3=t5_encoder(t5, 64),
        vae=tiny_vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _stable_diffusion() -> DiffusionPipeline:
    """With a safety checker, which finds something at random: see `set_safety_checker`."""
    clip = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    return StableDiffusionPipeline(
        tokenizer=clip,
        text_encoder=clip_encoder(clip, CLIPTextModel),
        vae=tiny_vae(4),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(projection_dim=16, vision_config=vision)),
        feature_extractor=CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32}),
    )


def set_safety_checker(model: Path, *, blocks: bool) -> None:
    """Make the safety checker of a model folder find something in every picture, or in none."""
    file = model / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    # A concept is found in pictures that are nearer to it than this; cosines lie in [-1, 1].
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        weights[name].fill_(-2.0 if blocks else 2.0)
    save_file(weights, file, {"format": "pt"})


def _stable_diffusion_xl() -> DiffusionPipeline:
    clip = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        tokenizer=clip,
        text_encoder=clip_encoder(clip, CLIPTextModel),
        tokenizer_2=clip,
        text_encoder_2=clip_encoder(clip, CLIPTextModelWithProjection),
        vae=tiny_vae(4),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def save_tiny_adapter(model: Path, folder: Path, seed: int, *, with_text_encoder: bool = False) -> Path:
    """Write a random LoRA adapter of the Flux or Stable Diffusion XL in `model` to `folder` and return that."""
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    layers = {f"{part}_lora_layers": _adapter_weights(getattr(pipeline, part), seed, ["to_q", "to_v"])}
    if with_text_encoder:
        layers["text_encoder_lora_layers"] = _adapter_weights(pipeline.text_encoder, seed, ["q_proj", "fc1"])
    pipeline.save_lora_weights(folder, **layers)
    return folder


def _adapter_weights(model: Any, seed: int, layers: list[str]) -> dict[str, torch.Tensor]:
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers))
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def _sky_reels() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    transformer = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return SkyReelsV2Pipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**t5_fields(tokenizer, 32))),
        transformer=transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )


def _ltx_image_to_video() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return LTXImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, 32),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "CogVideoXPipeline": cog_video_x,
    "CogView4Pipeline": cog_view_4,
    "HunyuanDiTPipeline": hunyuan_dit,
    "HunyuanVideo15Pipeline": hunyuan_video_1_5,
    "LongCatImagePipeline": long_cat_image,
    "MochiPipeline": mochi,
    "SanaPipeline": sana,
    "Flux2KleinPipeline": _flux_2_klein,
    "FluxKontextPipeline": lambda: FluxKontextPipeline(**_flux().components),
    "LTXImageToVideoPipeline": _ltx_image_to_video,
    "StableDiffusion3Img2ImgPipeline": lambda: StableDiffusion3Img2ImgPipeline(**_stable_diffusion_3().components),
    "StableDiffusionXLImg2ImgPipeline": lambda: StableDiffusionXLImg2ImgPipeline(
        **_stable_diffusion_xl().components, add_watermarker=False
    ),
    "SkyReelsV2Pipeline": _sky_reels,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
}
