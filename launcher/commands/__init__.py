"""One module per command of the `permafrost` program: `run(argv) -> exit code`. Importing them imports no torch."""
