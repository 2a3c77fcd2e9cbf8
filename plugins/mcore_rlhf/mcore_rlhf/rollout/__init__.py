"""Generating completions: options, conversations of several turns, engines."""
