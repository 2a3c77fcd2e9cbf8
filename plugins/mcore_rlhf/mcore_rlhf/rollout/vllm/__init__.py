"""Generation with vLLM: servers that `mcore rollout` starts, or in the training processes."""
