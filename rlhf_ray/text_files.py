"""Text as other programs write it: UTF-8, or UTF-16 or 32 with or without its mark, as Windows does."""

import json


def decode(content: bytes) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UnicodeDecodeError: it is of another encoding, such as Latin-1.
    """
    return content.decode(encoding(content))


def encoding(content: bytes) -> str:
    """What the first bytes of a text tell; utf-8 where they tell nothing."""
    return json.detect_encoding(content[:4])
