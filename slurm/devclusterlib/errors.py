"""What can go wrong, in the two kinds that a caller tells apart by exit code."""

from pathlib import Path


class UserError(Exception):
    """Bad input or a missing program: nothing was started (exit code 2)."""


class StartError(Exception):
    """Something did not start, or not in time (exit code 3)."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        """Keep the end of `log` now: the roll-back that follows deletes the file."""
        super().__init__(message)
        self.tail = _tail(log) if log else []


def _tail(log: Path, lines: int = 15) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
