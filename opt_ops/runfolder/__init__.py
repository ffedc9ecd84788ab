"""The files of docs/formats.md: read, check, write. One module a format."""
