"""Everything that runs: the `permafrost` command, the training loop, engines, run folders. No torch on import."""
