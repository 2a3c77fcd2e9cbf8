"""Generalized knowledge distillation: a student learns a teacher's distributions."""
