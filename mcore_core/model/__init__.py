"""Building and running a model on megatron-core."""
