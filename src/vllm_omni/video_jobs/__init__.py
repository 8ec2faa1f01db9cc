"""Video jobs: records, their store, their media files, and the service that runs them."""
