"""Models as folders or hub repositories: which family serves them, their files, and checks before loading."""
