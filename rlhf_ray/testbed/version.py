"""The testbed's version: a hash of its own source, computed rather than kept by hand.

It stands beside every result. When it changes, older figures no longer compare.
"""

import hashlib
from pathlib import Path

_SOURCES = ("world", "tasks", "judge", "annotator", "demonstrator", "corpus", "generate")


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        digest.update(f"{name}\n{text}\n".encode())
    return digest.hexdigest()[:12]


TESTBED_VERSION = _hash_sources()
"""Twelve hexadecimal digits; the same on every machine with the same source."""
