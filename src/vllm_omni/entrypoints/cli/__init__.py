"""The `vllm serve --omni` and `vllm-omni` commands."""
