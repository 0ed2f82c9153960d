"""Names that a file may have chosen, and lists of things, as they may stand in a message."""

from collections.abc import Iterable, Sequence

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


def ranges(numbers: Iterable[int]) -> str:
    """Return the numbers in order, with three and more in a row as a range: "0-7, 12, 13"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
