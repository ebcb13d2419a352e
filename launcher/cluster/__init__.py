"""Launch the nodes of a training, from the first look to the last rank: `permafrost launch`."""
