"""Text encoders, tokenizers, and the cache of encoded prompts."""
