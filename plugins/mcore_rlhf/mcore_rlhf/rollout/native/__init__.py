"""Generation with the training weights themselves: no second copy, nothing to synchronize."""
