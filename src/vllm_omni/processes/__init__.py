"""Child processes: channels for messages, and the end of a child with its parent."""
