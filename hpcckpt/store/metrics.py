"""`metrics.jsonl`: what run.log and run.report gave, cut back to the restored step so that no point is there twice."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from hpcckpt.store.durable import write_bytes
from hpcckpt.store.ledger import append_lines

# What every line has, whatever the metrics are called.
PLACE = ("kind", "epoch", "step")


class MetricsFile:
    """Rank 0's file of metrics; lines are buffered until `flush`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[dict[str, Any]] = []
        self._is_synced = True

    def add(self, kind: str, epoch: int, step: int, values: dict[str, Any]) -> None:
        """Keep one line for the next flush; values may be tensors on a device, which are not waited for here."""
        own = dict(zip(PLACE, (kind, epoch, step), strict=True))
        self._pending.append(own | values | own)

    def flush(self, *, durable: bool = False) -> list[dict[str, Any]]:
        """Append what is pending and return it, with plain values.

        With `durable` it is on the disk then, as is everything that an earlier flush has appended.
        """
        lines = [{key: _plain(value) for key, value in line.items()} for line in self._pending]
        self._pending.clear()
        if lines or (durable and not self._is_synced):
            append_lines(self._path, "".join(json.dumps(line) + "\n" for line in lines), durable=durable)
            self._is_synced = durable
        return lines

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the file that have a place in the run, oldest first."""
        return [line for _, line in self._read() if line is not None and _place(line) is not None]

    def cut_back(self, epoch: int, step: int, lines: int = 0) -> int:
        """Drop what lies behind a restored position and return how many lines went.

        All epochs before `epoch` are finished, and `step` optimizer steps are done. What belongs to a finished epoch stays,
        whatever its step: a log within the evaluation behind the last step has the next one's. In `epoch` itself a log stays if
        its step is done, and a report if a step was done behind it, since what is behind the restored step is done again; but
        for the first `lines` of those behind it, which were given before the checkpoint was taken, and will not be again.

        A line that is no JSON object was cut off by a crash and goes; an object without a place is somebody else's and stays.

        Raises:
            OSError: the file cannot be read or written; it is as it was.
        """
        self._pending.clear()
        kept, gone = [], 0
        for raw, line in self._read():
            is_behind = line is not None and _is_behind(line, epoch, step)
            if line is not None and (_stays(line, epoch, step) or (is_behind and lines > 0)):
                kept.append(raw + b"\n")
                lines -= is_behind
            else:
                gone += 1
        if gone:
            write_bytes(self._path, b"".join(kept))
        return gone

    def _read(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Yield each line as it stands and as an object; None where it is none."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        for raw in content.split(b"\n"):
            value = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(raw)
            if raw.strip():
                yield raw, value if isinstance(value, dict) else None


def _place(line: dict[str, Any]) -> tuple[int, int] | None:
    epoch, step = line.get("epoch"), line.get("step")
    return (epoch, step) if _is_count(epoch) and _is_count(step) else None


def _is_count(value: Any) -> TypeGuard[int]:
    # No bool, which is an int, and none that no file of a curve could hold.
    return type(value) is int and 0 <= value < 2**63


def _is_behind(line: dict[str, Any], epoch: int, step: int) -> bool:
    """Whether it was given behind the last one of `step` steps and before the next."""
    return _place(line) == (epoch, step + (line.get("kind") == "log"))


def _stays(line: dict[str, Any], epoch: int, step: int) -> bool:
    place = _place(line)
    if place is None or place[0] != epoch:
        return place is None or place[0] < epoch
    return place[1] < step if line.get("kind") == "report" else place[1] <= step


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    number = item() if callable(item) else value
    return number if isinstance(number, int | float | str | None) else str(number)
