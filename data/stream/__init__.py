"""From a data set to batches: which samples, in which order, on which rank."""
