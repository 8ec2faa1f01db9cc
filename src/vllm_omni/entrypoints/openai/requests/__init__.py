"""Request bodies: from bytes to checked fields, prompts and decoded pictures."""
