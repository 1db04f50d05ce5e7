"""Optimizers by name, and the step that unscales, clips and updates in one pass."""
