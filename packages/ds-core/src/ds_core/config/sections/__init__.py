"""The sections of a configuration, one class each; a module per topic. They know nothing of how files are read."""
