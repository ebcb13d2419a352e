"""Split one backbone over a group of processes."""
