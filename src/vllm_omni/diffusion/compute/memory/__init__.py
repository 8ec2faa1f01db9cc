"""Budget of a device's memory, from configs and file headers: before a weight is read."""
