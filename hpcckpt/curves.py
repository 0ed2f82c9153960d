"""Curves in TensorBoard and Weights & Biases that are one curve each, however often the run was interrupted.

Both are kept in step with `metrics.jsonl`, which is cut back to where an attempt goes on. TensorBoard's event files can only grow, but
a reader drops what lies behind a mark in them; a service keeps what it was given, so it is given nothing twice.
"""

import contextlib
import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hpcckpt.errors import CheckpointCorruptError, UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.store.durable import read_json, write_json
from hpcckpt.store.metrics import PLACE

Line = Mapping[str, Any]

# The step of a row that is complete, in the row: the user's own rows have a step too, and come before those of earlier steps.
_COMPLETE = "hpcckpt/step"

# A node's clock may be this far behind the one of the node before it.
_PATIENCE_S = 5.0


class Curve(Protocol):
    """A curve beside metrics.jsonl. Whatever it raises ends it, and nothing else."""

    name: str
    # What the user's own calls go to.
    handle: Any

    def go_on(self, lines: Sequence[Line], step: int) -> None:
        """Make it agree with all lines that are in metrics.jsonl, before the first `add`."""

    def add(self, lines: Sequence[Line], step: int) -> None:
        """Take lines that have just been written, with `step` optimizer steps done, and give up nothing to a kill from here on."""

    def close(self, step: int, *, finished: bool) -> None:
        """Leave it; where the run is not finished, a later attempt goes on with it."""


class TensorBoard:
    """Event files for TensorBoard; `handle` is torch's SummaryWriter."""

    name = "TensorBoard"

    def __init__(self, folder: str | Path, step: int, arguments: Mapping[str, Any]) -> None:
        """Open another event file in `folder`, behind the mark that drops all points from `step` on.

        Raises:
            UsageError: the package is missing, or an argument is wrong or not the user's.
        """
        _refuse("run.tensorboard", arguments, ("purge_step",), "it is the step that the run goes on from")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"run.tensorboard: cannot be imported ({error}); pip install 'hpcckpt[tensorboard]'") from None
        newest = _newest_event_file(str(folder))
        # All of it where there is nothing yet: a run may get its curve later than its first points.
        self._from = step if newest is not None else None
        _wait_for_a_later_second(newest or 0)
        try:
            self.handle: Any = SummaryWriter(str(folder), purge_step=step, **arguments)
        except TypeError as error:
            raise UsageError(f"run.tensorboard: {error}") from None

    def go_on(self, lines: Sequence[Line], step: int) -> None:
        """Give the points again that stayed in metrics.jsonl, but lie behind the mark, or in no event file yet."""
        self.add([line for line in lines if self._from is None or line["step"] >= self._from], step)

    def add(self, lines: Sequence[Line], step: int) -> None:  # noqa: ARG002 - as Curve
        """Write points, and have them in the file, with the user's own."""
        for line in lines:
            for name, value in _values(line):
                if isinstance(value, str):
                    self.handle.add_text(name, value, line["step"])
                else:
                    self.handle.add_scalar(name, _float(value), line["step"])
        self.handle.flush()

    def close(self, step: int, *, finished: bool) -> None:  # noqa: ARG002 - as Curve
        """Close the event file."""
        self.handle.close()


class WeightsAndBiases:
    """A run of Weights & Biases; `handle` is what wandb.init returned.

    One row for each step, sent when the step cannot get any more values: when the next one is done. What a resumed run has already
    is told by its last row, so none is sent twice, and a kill costs none. The step is a value of the row and the x axis of all
    charts; wandb's own count of rows goes on beside it, since it takes no step back and the user's own calls move it, too.
    """

    name = "Weights & Biases"

    def __init__(self, layout: RunLayout, name: str, arguments: Mapping[str, Any]) -> None:
        """Begin a run, or resume that of the attempt before.

        Raises:
            UsageError: the package is missing, or an argument is wrong or not the user's, or wandb.init was called before.
        """
        reason = f"it belongs to this run directory; delete {layout.wandb} for a new one"
        _refuse("run.wandb", arguments, ("id", "resume", "resume_from", "fork_from"), reason)
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise UsageError(f"run.wandb: cannot be imported ({error}); pip install wandb") from None
        if not hasattr(wandb, "init"):  # a folder of that name is a package, too
            raise UsageError("run.wandb: the package is missing; pip install wandb")
        if getattr(wandb, "run", None) is not None:
            raise UsageError("run.wandb: wandb.init was called before; leave it to run.wandb, which takes its arguments")
        own = {"id": _run_id(layout), "resume": "allow", "dir": str(layout.root), "name": name}
        try:
            self.handle: Any = wandb.init(**(own | dict(arguments)))
        except TypeError as error:
            raise UsageError(f"run.wandb: {error}") from None
        self.handle.define_metric("*", step_metric="step")
        self.handle.define_metric(_COMPLETE, hidden=True)
        last = self.handle.summary.get(_COMPLETE)
        self._last = last if isinstance(last, int | float) else -1
        self._held: dict[int, dict[str, Any]] = {}

    def go_on(self, lines: Sequence[Line], step: int) -> None:
        """Send what the service has not got yet: all of it to a new run."""
        self.add(lines, step)

    def add(self, lines: Sequence[Line], step: int) -> None:
        """Send the rows of all steps before `step`; its own may get more values."""
        for line in lines:
            if line["step"] > self._last:
                self._held.setdefault(line["step"], {}).update(_values(line), epoch=line["epoch"], step=line["step"])
        self._send(number for number in self._held if number < step)

    def close(self, step: int, *, finished: bool) -> None:
        """Send the rest and end the run; one that goes on later is left to wandb's own end, and gets the rest from there.

        The service may be out of reach, and a run that was told to stop has no time to wait for it.
        """
        if finished:
            # A log within the last evaluation has the number of a step that there may be in a longer run.
            late = [self._held.pop(number) for number in sorted(self._held) if number > step]
            for row in late:
                self._held.setdefault(step, {}).update(row, step=step)
            self._send(self._held)
            self.handle.finish()

    def _send(self, numbers: Iterable[int]) -> None:
        for number in sorted(numbers):
            self.handle.log(self._held.pop(number) | {_COMPLETE: number})


def _run_id(layout: RunLayout) -> str:
    """Return the id of this run directory's run of Weights & Biases: a new one behind each resume.* that was carried out.

    What follows a rewind is another curve, and the service keeps the points of the old one.
    """
    request = _request(layout)
    with contextlib.suppress(CheckpointCorruptError, KeyError):
        known = read_json(layout.wandb)
        if known is not None and known["request"] == request:
            return str(known["id"])
    run_id = secrets.token_hex(6)
    write_json(layout.wandb, {"id": run_id, "request": request})
    return run_id


def _request(layout: RunLayout) -> int | None:
    """Return what tells the last request to go on from elsewhere from those before it: when it was carried out."""
    try:
        return layout.resume_request.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _refuse(call: str, arguments: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in arguments:
            raise UsageError(f"{call}({name}=…): is not for you to give, {reason}")


def _values(line: Line) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in line.items() if name not in PLACE and isinstance(value, int | float | str)]


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        return math.inf if value > 0 else -math.inf


def _newest_event_file(folder: str) -> int | None:
    """Return the second in the name of the newest event file, None without any."""
    with contextlib.suppress(OSError):
        matches = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in Path(folder).iterdir()]
        return max((int(match[1]) for match in matches if match), default=None)
    return None


def _wait_for_a_later_second(newest: int) -> None:
    """Wait until a new event file is read behind those there are: readers go by the second in the name."""
    behind = newest + 1 - time.time()
    if behind > _PATIENCE_S:
        print(
            f"hpcckpt: note: TensorBoard: this node's clock is {behind:.0f} s behind the last one's; points may be shown twice", flush=True
        )
    elif behind > 0:
        time.sleep(behind)
