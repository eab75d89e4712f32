"""Deliberate breaks of the library, each of which the tests must catch: `python tests/mutants/run.py`."""
