"""Agreement between the ranks of a replica: failures, skipped blocks, captures."""
