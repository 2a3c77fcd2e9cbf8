"""Mixtures of experts: the router, grouped experts, and the layer around them."""
