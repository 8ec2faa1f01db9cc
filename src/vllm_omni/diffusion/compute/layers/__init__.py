"""Layers of transformers: linear layers, norms, rotary embeddings, float8."""
