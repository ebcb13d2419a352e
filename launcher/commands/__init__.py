"""One module per command of the `permafrost` program: each has `run(argv) -> exit code`, and importing it imports no torch."""
