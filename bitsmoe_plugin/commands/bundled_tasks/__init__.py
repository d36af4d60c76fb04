"""A task of lm-eval that comes with the package, and its data: the last words of sentences of old books."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""For ``--include_path`` of lm-eval."""
