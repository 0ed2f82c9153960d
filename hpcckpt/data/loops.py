"""Which loops over loaders are being run, and where in them the last step was made."""

from collections.abc import Mapping
from typing import Any

from hpcckpt.data.loader import Cursor


class Loops:
    """The loaders of a run, in order of creation. A checkpoint's position is that of the last step, wherever it is saved."""

    def __init__(self) -> None:
        self._cursors: list[Cursor] = []
        # Those whose loops are being run, the outermost first.
        self._running: list[Cursor] = []
        # The loader in whose loop the last step of this epoch was made.
        self._last: str | None = None
        # The same of the restored checkpoint, until that loop is entered.
        self._resuming: str | None = None
        self._restored: tuple[int, Mapping[str, dict[str, int]]] = (0, {})

    def __len__(self) -> int:
        """Return how many loaders there are."""
        return len(self._cursors)

    def add(self, cursor: Cursor) -> None:
        """Take a loader in, and put it where the restored checkpoint has it."""
        self._cursors.append(cursor)
        self._place(cursor)

    def restore(self, epoch: int, loaders: Mapping[str, dict[str, int]], last: str | None) -> None:
        """Put all loaders, also those that are yet to come, where a checkpoint within `epoch` has them."""
        self._restored = epoch, loaders
        self._last = self._resuming = last
        for cursor in self._cursors:
            self._place(cursor)

    def begin(self, cursor: Cursor, epoch: int) -> bool:
        """Note that a loop begins; returns whether it is the one in which the restored checkpoint's last step was made."""
        cursor.begin(epoch)
        self._running.append(cursor)
        resumes = self._resuming == cursor.number
        if resumes:
            self._resuming = None
        return resumes

    def end(self, cursor: Cursor) -> None:
        """Note that a loop is over."""
        self._running.remove(cursor)
        cursor.end()

    def step(self) -> None:
        """Note an optimizer step in all loops that are being run."""
        for cursor in self._running:
            cursor.step()
        self._last = self._running[0].number if self._running else None

    def end_epoch(self) -> None:
        """Forget the epoch's positions."""
        self._last = self._resuming = None
        self._restored = (0, {})
        for cursor in self._cursors:
            cursor.forget()

    @property
    def is_between_batches(self) -> bool:
        """Whether no batch was handed to the training behind its last step.

        Loops without steps (an evaluation's) do not matter, but which those are is known only when one has had a step.
        """
        known = any(cursor.trains for cursor in self._cursors)
        return not any(cursor.in_progress and (cursor.trains or not known) for cursor in self._running)

    def data_state(self, epoch: int) -> dict[str, Any]:
        """Return the positions within `epoch` for a checkpoint."""
        positions = {cursor.number: cursor.position(epoch) for cursor in self._cursors}
        return {"loaders": {number: place for number, place in positions.items() if place is not None}, "last_loader": self._last}

    def _place(self, cursor: Cursor) -> None:
        epoch, loaders = self._restored
        if cursor.number in loaders:
            cursor.restore(epoch, loaders[cursor.number])
