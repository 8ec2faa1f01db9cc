"""What other servers and the public vllm-omni package call things, and what becomes of it here."""
