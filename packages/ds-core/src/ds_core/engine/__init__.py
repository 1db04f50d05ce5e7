"""The engine: ``engine.py`` is the sequence of a step, ``build.py`` the only module that knows concrete parts."""
