"""What users start: the command line, the HTTP server, and import paths of the public vllm-omni package."""
