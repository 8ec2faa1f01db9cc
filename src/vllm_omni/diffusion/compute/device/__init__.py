"""Kinds of device, streams, CUDA graph capture, timing, and copies between a device and the host."""
