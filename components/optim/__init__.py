"""Optimizers with parameter groups, learning-rate schedules."""
