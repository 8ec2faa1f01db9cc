"""Devices, and transfers between a device and the host."""
