"""Partitions: who holds which part of parameters, gradients and optimizer state. Built in: ``replicated`` (stage 0)."""
