"""Start of a worker: resolve the config, choose, compile, warm up and measure. Entry point: `model_start`."""
