"""The entry point of the `vllm.general_plugins` group."""

from __future__ import annotations


def register() -> None:
    """Do nothing, cheaply.

    vLLM calls this in every process it starts, whatever it serves. Our way in is `--omni`, which vLLM's command
    hands over before any plugin loads, so there is nothing to patch or register. The entry point exists so that
    vLLM's list of plugins shows the package and `VLLM_PLUGINS` can name it.
    """
