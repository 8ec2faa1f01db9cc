"""From the bytes of a request to what the engine takes: bodies, uploads, fetched pictures."""
