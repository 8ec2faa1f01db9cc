"""Worker processes: one for each rank, which runs the steps that it is sent."""
