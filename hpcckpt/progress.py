"""Sparse lines about the training for a log file: at most one every few seconds, from rank 0."""

import time
from typing import Any

INTERVAL_S = 5.0


class Progress:
    """Says where the training is and how fast it goes."""

    def __init__(self, epochs: int | None = None) -> None:
        self._epochs = epochs
        self._step: int | None = None
        self._at = time.monotonic()

    def line(self, epoch: int, step: int, values: dict[str, Any]) -> str:
        """Return one line; the speed is that since the line before."""
        now = time.monotonic()
        parts = [f"epoch {epoch}" + ("" if self._epochs is None else f" of 0..{self._epochs - 1}"), f"step {step}"]
        parts += [f"{name} {_short(value)}" for name, value in values.items() if name not in ("kind", "epoch", "step")]
        if self._step is not None and step > self._step and now > self._at:
            parts.append(f"{(step - self._step) / (now - self._at):.1f} steps/s")
        self._step, self._at = step, now
        return "hpcckpt: " + "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
