"""Worker processes: one for each rank. A worker executes the plans that the engine sends."""
