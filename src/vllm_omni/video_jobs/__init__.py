"""Video jobs: records, their store, and the service that runs them."""
