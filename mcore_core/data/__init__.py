"""Rows to packed micro-batches."""
