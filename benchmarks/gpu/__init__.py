"""All measurements of a GPU in one command, next to the roofline's predictions: `python -m benchmarks.gpu`."""
