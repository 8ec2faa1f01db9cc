"""The half that computes: workers, model families, attention, step caches, parallel exchanges."""
