"""What a restart says about itself: what was restored, whether it goes on to the last bit, and if not, why."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpcckpt.state.text import ranges


@dataclass(frozen=True)
class Exactness:
    """The report of one restart, for the log and the ledger. Texts are short, and each is one line."""

    # What came back: "model", "generators of 4 ranks".
    restored: tuple[str, ...] = ()
    # Why the result is no longer that of an uninterrupted run, or cannot be known to be.
    differs: tuple[str, ...] = ()
    # Why it may differ from run to run all the same.
    doubts: tuple[str, ...] = ()
    # What is worth knowing and leaves exactness alone.
    notes: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Return whether nothing is known that makes this run another one than if it had never stopped."""
        return not self.differs

    def lines(self) -> list[str]:
        """Return it in words, the verdict first."""
        restored = ", ".join(map(_on_one_line, self.restored)) or "nothing"
        if self.differs:
            first = [f"NOT bit-exact from here on: {'; '.join(map(_on_one_line, self.differs))}", f"restored {restored}"]
        elif not self.restored:
            first = ["nothing restored: begins anew"]
        elif self.doubts:
            first = [f"restored to the last bit: {restored}"]
        else:
            first = [f"bit-exact: restored {restored}"]
        doubts = [f"may differ from run to run: {_on_one_line(doubt)}" for doubt in self.doubts]
        return [*first, *doubts, *(f"note: {_on_one_line(note)}" for note in self.notes)]

    def fields(self) -> dict[str, bool | list[str]]:
        """Return it as plain values, for one line of the ledger."""
        return {
            "bit_exact": self.is_exact,
            "restored": list(self.restored),
            "differs": list(self.differs),
            "doubts": list(self.doubts),
            "notes": list(self.notes),
        }


def per_rank(texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return what the ranks found, each text once, in the order in which rank 0, then 1 and so on found it.

    What all of them say stands alone; what some say begins with who they are: "ranks 0-7, 12: …".

    Args:
        texts: of each rank; the index is the rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(texts):
        for text in dict.fromkeys(found):
            ranks.setdefault(text, []).append(rank)
    return tuple(text if len(who) == len(texts) else f"{_named(who)}: {text}" for text, who in ranks.items())


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
