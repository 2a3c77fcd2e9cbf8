"""Mixture of experts for mcore: an empty shell until it lands."""
