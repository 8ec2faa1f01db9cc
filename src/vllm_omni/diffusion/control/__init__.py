"""The half that decides: engine, replicas, scheduler, queue, executors. It computes no tensors."""
