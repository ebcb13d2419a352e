"""Turn a data set into batches: which samples, in which order, on which rank."""
