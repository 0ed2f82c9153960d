"""What a run gives to be looked at: `metrics.jsonl`, one line of progress in the job's log, and the curves beside them.

Rank 0 alone has a recorder. `metrics.jsonl` is the truth: cut back to where the attempt goes on, it has each point once, and the
curves are made to agree with it. Values may be tensors on a device: nothing is waited for but in `flush`.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpcckpt.curves import Curve, TensorBoard, WeightsAndBiases
from hpcckpt.errors import UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.progress import INTERVAL_S, Progress
from hpcckpt.store.metrics import MetricsFile


class Recorder:
    """Owns the metrics, the line of progress and the curves of a run. Rank 0 only.

    Order: `begin` once; then `log`, `report` and `flush` as often as there is something; `close`.
    """

    def __init__(self, layout: RunLayout, name: str) -> None:
        self._layout, self._name = layout, name
        self._file = MetricsFile(layout.metrics)
        self._progress = Progress()
        self._curves: list[Curve] = []
        self._attached: set[str] = set()
        self._began_at: int | None = None
        self._step = 0
        # How many lines were given behind the last step.
        self._place, self._lines = (0, 0), 0
        self._due_at = 0.0

    def begin(self, epoch: int, step: int, lines: int = 0) -> None:
        """Go on at a position: the epochs before `epoch` are finished, `step` optimizer steps are done, `lines` given since.

        Drops what lies behind it from metrics.jsonl. Failing that is no reason not to train: it is said.
        """
        self._began_at = self._step = step
        self._place, self._lines = (epoch, step), lines
        try:
            self._file.cut_back(epoch, step, lines)
        except OSError as error:
            _note(
                f"{self._layout.metrics}: could not be cut back ({error.strerror or error}); points behind step {step} will be there twice"
            )

    def start(self, total_epochs: int) -> None:
        """Say how many epochs there will be; the speed is counted from here."""
        self._progress = Progress(total_epochs)

    def tensorboard(self, log_dir: str | Path | None = None, **arguments: Any) -> Any:
        """Write all that is logged and reported to event files too; returns the SummaryWriter.

        Args:
            log_dir: where they go; `<run_dir>/tensorboard`.
            arguments: of SummaryWriter.

        Returns:
            None where it failed: that is said, and the training goes on without.

        Raises:
            UsageError: the package is missing, an argument is wrong or would break the curve, or called before `begin`, or twice.
        """
        folder = self._layout.tensorboard if log_dir is None else log_dir
        return self._attach("TensorBoard", lambda step: TensorBoard(folder, step, arguments))

    def wandb(self, **arguments: Any) -> Any:
        """Send all that is logged and reported to Weights & Biases too; returns the run of wandb.

        Args:
            arguments: of wandb.init.

        Returns:
            None where it failed: that is said, and the training goes on without.

        Raises:
            UsageError: the package is missing, an argument is wrong or would break the curve, or called before `begin`, or twice.
        """
        return self._attach("Weights & Biases", lambda _: WeightsAndBiases(self._layout, self._name, arguments))

    def log(self, epoch: int, step_done: int, values: Mapping[str, Any]) -> None:
        """Keep values of the step in progress; nothing is written or waited for here."""
        self._count(epoch, step_done)
        self._step = step_done
        # Copies, which are not waited for either: a running sum goes on, and a tensor may hold on to the whole step's memory.
        copies = {name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        self._file.add("log", epoch, step_done + 1, copies)

    def report(self, epoch: int, step_done: int, values: Mapping[str, Any]) -> None:
        """Keep metrics of the state behind `step_done` steps; nothing is written or waited for here."""
        self._count(epoch, step_done)
        self._step = step_done
        self._file.add("report", epoch, step_done, dict(values))

    def lines(self, epoch: int, step: int) -> int:
        """Return how many lines were given in `epoch` behind `step` steps, and before the next."""
        return self._lines if self._place == (epoch, step) else 0

    def _count(self, epoch: int, step: int) -> None:
        self._lines = self.lines(epoch, step) + 1
        self._place = epoch, step

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next line of progress; costs a look at the clock."""
        return time.monotonic() >= self._due_at

    def flush(self, epoch: int, step: int, *, durable: bool = False) -> None:
        """Write down what was given since the last time, and print one line of progress if that was anything.

        Call it before each checkpoint, with `durable`: what lies before the position of a checkpoint is not given again.
        """
        self._step = step
        self._due_at = time.monotonic() + INTERVAL_S
        lines = self._write(durable=durable)
        if lines:
            print(self._progress.line(epoch, step, lines[-1]), flush=True)

    def close(self, *, finished: bool = True) -> None:
        """Write down what is left and leave the curves; harmless when called twice.

        Where the run is not `finished`, a later attempt goes on with them: none is told that it is complete, and none is waited
        for. Where it is, the service of a curve may be slow: call it when nobody waits for this rank any more.
        """
        self._write(durable=True)
        self._each(lambda curve: curve.close(self._step, finished=finished))
        self._curves.clear()

    def _write(self, *, durable: bool) -> list[dict[str, Any]]:
        lines = self._file.flush(durable=durable)
        self._each(lambda curve: curve.add(lines, self._step))
        return lines

    def _each(self, act: Callable[[Curve], None]) -> None:
        for curve in self._curves.copy():
            self._try(curve, act)

    def _attach(self, what: str, make: Callable[[int], Curve]) -> Any:
        if self._began_at is None:
            raise UsageError(f"{what}: it is not known yet where the run goes on; attach it later")
        if what in self._attached:
            raise UsageError(f"{what}: is attached already; call it once, and keep what it returns")
        try:
            curve = make(self._began_at)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - a curve never stops the training, whatever library draws it
            _note(f"{what}: {type(error).__name__}: {error}; the training goes on without, and {self._layout.metrics} has all points")
            return None
        self._attached.add(what)
        self._curves.append(curve)
        self._try(curve, lambda curve: curve.go_on(self._file.lines(), self._step))
        return curve.handle

    def _try(self, curve: Curve, act: Callable[[Curve], None]) -> None:
        try:
            act(curve)
        except Exception as error:  # noqa: BLE001 - as above
            self._curves.remove(curve)
            _note(f"{curve.name}: {type(error).__name__}: {error}; this curve ends here, and {self._layout.metrics} goes on")


def refuse_many(values: Mapping[str, Any]) -> None:
    """Refuse what is no number, or more than one; a tensor on a device is not waited for.

    Raises:
        UsageError: one is; names it.
    """
    for name, value in values.items():
        if not isinstance(value, int | float | str) and math.prod(getattr(value, "shape", (0,))) != 1:
            raise UsageError(f"run.log({name}=…): a {type(value).__name__} is no number, or more than one; log its mean, say")


def _note(text: str) -> None:
    print(f"hpcckpt: note: {text}", flush=True)
