"""Loading of weights from safetensors files, and random weights."""
