"""What the programs of this folder can be told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """As `python -m benchmarks.checkpoints --help` says."""

    quick: bool = False
    # As given; None is each program's own.
    states: tuple[str, ...] | None = None
    rounds: int | None = None
    folder: Path | None = None
    settle_s: float = 0.5
