"""Names that a file may have chosen, as they may stand in a message."""

from collections.abc import Sequence

_LENGTH = 160
_SHOWN = 5


def printable(text: str, length: int = _LENGTH) -> str:
    """Return the beginning of `text` on one line, without control characters."""
    kept = "".join(character for character in text[: 4 * length] if character.isprintable())
    return kept if len(kept) <= length and len(text) <= 4 * length else f"{kept[:length]}…"


def listed(items: Sequence[object], shown: int = _SHOWN) -> str:
    """Return a few of the items, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(printable(str(item)) for item in items[:shown]) + more
