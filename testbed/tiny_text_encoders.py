"""Tokenizers, and tiny random text encoders of the CLIP and T5 families. Nothing is trained: each run has the same."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import BertTokenizer, CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WORDS = "a photo of a red apple and a blue car on a wooden table in the style of an old master with warm light"
CLIP_TOKENS = 77
T5_TOKENS = 128


def clip_encoder(tokenizer: CLIPTokenizer, cls: type[Any]) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**t5_fields(tokenizer, width)))


def t5_fields(tokenizer: T5Tokenizer, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which nothing is unknown; each of `WORDS` is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, *(letter + "</w>" for letter in alphabet)])}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(WORDS.split()):
        joined, *letters = [*word[:-1], word[-1] + "</w>"]
        for letter in letters:
            if (joined, letter) not in merges:
                merges.append((joined, letter))
            joined += letter
            vocab.setdefault(joined, len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Unigrams: `WORDS`, and the letters of others."""
    words = [f"▁{word}" for word in dict.fromkeys(WORDS.split())]
    letters = "abcdefghijklmnopqrstuvwxyz,.▁"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, -1.0) for word in words if len(word) > 1] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_TOKENS)


def bert_tokenizer() -> BertTokenizer:
    """`WORDS`; others are unknown."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS.split())]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=CLIP_TOKENS)
