"""One backbone over a group of processes."""
