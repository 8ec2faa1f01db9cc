"""Child processes: message channels, and children that end with their parent."""
