"""`metrics.jsonl`: what run.log and run.report gave, cut back to the restored step so that no point is there twice."""

import json
from pathlib import Path
from typing import Any

from hpcckpt.store.durable import write_bytes
from hpcckpt.store.ledger import append_lines, read_lines


class MetricsFile:
    """Rank 0's file of metrics; lines are buffered until `flush`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[dict[str, Any]] = []

    def add(self, kind: str, epoch: int, step: int, values: dict[str, Any]) -> None:
        """Keep one line for the next flush; values may be tensors on a device, which are not waited for here."""
        own = {"kind": kind, "epoch": epoch, "step": step}
        self._pending.append(own | values | own)  # cut_back relies on these three, whatever a metric is called

    def flush(self) -> dict[str, Any]:
        """Append what is pending and return its last line; {} when nothing was pending."""
        if not self._pending:
            return {}
        lines = [{key: _plain(value) for key, value in line.items()} for line in self._pending]
        self._pending.clear()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        append_lines(self._path, text)
        return lines[-1]

    def cut_back(self, step: int, epochs_finished: int) -> int:
        """Drop what lies behind the restored position and return how many lines went.

        A log line belongs to the optimizer step it was given in, a report line to its epoch.
        """
        self._pending.clear()
        lines = read_lines(self._path)
        kept = [
            line
            for line in lines
            if (line.get("epoch", 0) < epochs_finished if line.get("kind") == "report" else line.get("step", 0) <= step)
        ]
        if len(kept) < len(lines):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_bytes(self._path, text.encode())
        return len(lines) - len(kept)


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    return item() if callable(item) else value
