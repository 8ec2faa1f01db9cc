"""Names from other servers and from the public vllm-omni package, and their meaning here."""
