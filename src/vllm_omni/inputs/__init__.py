"""Inputs of `generate`: prompts, pictures, sampling parameters and adapters."""
