"""Flags, keywords and names of other servers and of the public vllm-omni package, and their treatment here."""
