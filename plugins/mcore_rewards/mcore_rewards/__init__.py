"""Reward functions for mcore: an empty shell until they land."""
