"""Checkpoints on logical tensors. Built in: ``plain``, one safetensors file per rank and a manifest."""
