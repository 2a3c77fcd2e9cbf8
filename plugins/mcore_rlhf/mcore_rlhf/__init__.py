"""Preference and reinforcement learning for mcore: an empty shell until its recipes land."""
