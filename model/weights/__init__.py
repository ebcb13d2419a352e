"""Read weight files of every public format, as untrusted input, and write our own."""
