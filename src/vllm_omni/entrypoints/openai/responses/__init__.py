"""From finished pictures to response bodies: encoding, JSON, server-sent events, files."""
