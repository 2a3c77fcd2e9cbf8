"""HF <-> megatron-core weights."""
