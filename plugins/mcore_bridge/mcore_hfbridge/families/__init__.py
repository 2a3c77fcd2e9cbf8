"""One file a family: which HF configs it reads, and its table."""
