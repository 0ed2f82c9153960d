"""The ledger: one line of JSON for everything that happens to a run. Append-only, readable while it is written."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any


class Ledger:
    """Appends to and reads `events.jsonl`.

    With a `generation` each event says which attempt it is of: one that was overtaken may write long after the next has begun.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.generation: int | None = None

    def append(self, event: str, /, **fields: Any) -> None:
        """Add one event, durably: what a later attempt counts (requeues, progress) must survive this one.

        Any rank may call it.
        """
        stamp = {"time": round(time.time(), 3), "event": event} | ({} if self.generation is None else {"generation": self.generation})
        line = json.dumps({**stamp, **fields}, default=str) + "\n"
        append_lines(self._path, line, durable=True)

    def events(self, skip: int = 0) -> list[dict[str, Any]]:
        """Return the events behind the first `skip`, oldest first; a line that a crash cut off is left out."""
        return read_lines(self._path)[skip:]


def append_lines(path: Path, text: str, *, durable: bool = False) -> None:
    """Append whole lines in a single write, so that those of several processes do not mix.

    What is noted here must never stop a run: a full disk costs the lines and nothing else.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # A line that a crash or a full disk cut off must not take the next one with it.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * torn + text.encode())
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; no file is no lines, a damaged line is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    objects = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects
