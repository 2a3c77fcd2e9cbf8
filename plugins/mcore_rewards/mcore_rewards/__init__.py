"""Rewards that a program can check, and reasoning-gym."""
