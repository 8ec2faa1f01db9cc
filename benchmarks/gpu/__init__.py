"""All measurements of a GPU in one command, next to what the roofline predicts: `python -m benchmarks.gpu`."""
