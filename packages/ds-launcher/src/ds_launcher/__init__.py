"""ds-launcher: starts and supervises the ranks of a training job (``ds run``)."""

__version__ = "0.1.0"

__all__ = ["__version__"]
