"""Name what happens in a clip."""
