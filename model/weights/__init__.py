"""Weight files of every public format, read as untrusted input, and written in our own."""
