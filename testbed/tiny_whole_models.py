"""Tiny random models of further pipelines that diffusers runs whole: HunyuanDiT, Mochi, CogVideoX, CogView4, Sana,
LongCat-Image, HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5EncoderModel,
)

from testbed.tiny_models import tiny_text_encoder, tiny_tokenizer
from testbed.tiny_text_encoders import bert_tokenizer, t5_encoder, t5_tokenizer
from testbed.tiny_z_image import CHAT_TEMPLATE


def tiny_vae(latent_channels: int, **settings: Any) -> AutoencoderKL:
    """A VAE of pictures, 8 pixels a side to a latent pixel."""
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.5,
        force_upcast=False,
        **settings,
    )


def hunyuan_dit() -> DiffusionPipeline:
    words, t5_words = bert_tokenizer(), t5_tokenizer()
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    bert = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return HunyuanDiTPipeline(
        tokenizer=words,
        text_encoder=BertModel(bert),
        tokenizer_2=t5_words,
        text_encoder_2=t5_encoder(t5_words, 32),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def mochi() -> DiffusionPipeline:
    words = t5_tokenizer()
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=64,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),  # 32 groups in each norm
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words, 32),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def cog_video_x() -> DiffusionPipeline:
    words = t5_tokenizer()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=64,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return CogVideoXPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words, 32),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def cog_view_4(encodes_empty: bool = True) -> DiffusionPipeline:
    """encodes_empty: whether its tokenizer makes tokens of an empty prompt, which guidance needs."""
    words = t5_tokenizer() if encodes_empty else tiny_tokenizer()
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
    )
    glm = GlmConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    return CogView4Pipeline(
        tokenizer=words,
        text_encoder=GlmModel(glm),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )


def sana() -> DiffusionPipeline:
    """A Sana of 512 pixels a side, which makes one of the sizes of that table and resizes the picture."""
    words = t5_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=16,
    )
    channels = (4, 4, 4, 4, 4, 4)
    blocks = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", "ResBlock"),
            ("block_out_channels", channels),
            ("layers_per_block", (0, 0, 0, 0, 0, 1)),
            ("qkv_multiscales", ((),) * 6),
        )
    }
    gemma = Gemma2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    return SanaPipeline(
        tokenizer=words,
        text_encoder=Gemma2Model(gemma),
        vae=AutoencoderDC(latent_channels=4, scaling_factor=0.5, **blocks),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def hunyuan_video_1_5() -> DiffusionPipeline:
    tokenizer, bytes_tokenizer = tiny_tokenizer(), ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = CHAT_TEMPLATE
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,  # the pipeline takes the third state from the end
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 6, 8),
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
    glyphs: T5EncoderModel = t5_encoder(bytes_tokenizer, 32)
    return HunyuanVideo15Pipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer_2=bytes_tokenizer,
        text_encoder_2=glyphs,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def long_cat_image() -> DiffusionPipeline:
    """A LongCat-Image, which rewrites each prompt by its text encoder first; this one writes a single token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    text_encoder = tiny_text_encoder(tokenizer, 32, 2, 1)
    text_encoder.generation_config.eos_token_id = list(range(len(tokenizer)))
    transformer = LongCatImageTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
    )
    return LongCatImagePipeline(
        tokenizer=tokenizer,
        text_processor=tokenizer,  # published as a Qwen2VLProcessor, which needs torchvision
        text_encoder=text_encoder,
        vae=tiny_vae(16, shift_factor=0.1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
