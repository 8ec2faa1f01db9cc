"""Where weights lie while they are not used: offload by blocks and by components."""
