"""Recomputation of activations: the built-in plugin of the seam ``activation``. Called as ``ds_core.checkpointing``."""
