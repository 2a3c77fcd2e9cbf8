"""Tuners: which parameters train, and how what was trained is saved."""
