"""Layouts, process groups and the only reductions."""
