"""The front end: HTTP in, shared-memory rings out."""
