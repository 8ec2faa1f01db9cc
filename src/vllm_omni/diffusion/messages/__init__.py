"""Data that the control half and the workers exchange: requests, step plans, results."""
