"""Programs that users start: the command line and the HTTP server; and import paths of the public package."""
