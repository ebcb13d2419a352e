"""One module per command of the `permafrost` program: `run(argv) -> exit code`. Their imports at module level are torch-free."""
