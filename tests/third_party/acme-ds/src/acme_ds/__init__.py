"""A stranger's plugins for the ds runtime."""
