"""What a caller hands in: prompts and sampling parameters."""
