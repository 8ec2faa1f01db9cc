"""Entry point of the group `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Do nothing.

    vLLM calls this in every process that it starts, whatever it serves. There is nothing to patch or register, because
    vLLM's command calls our `main` for `--omni` before any plugin is loaded. The entry point exists so that vLLM's list
    of plugins shows the package and `VLLM_PLUGINS` can name it.
    """
