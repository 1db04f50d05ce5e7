"""Where training events are written: the built-in plugins of the seam ``monitor``."""
