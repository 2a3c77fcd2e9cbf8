"""Preference optimization from single answers that are good or bad (KTO)."""
