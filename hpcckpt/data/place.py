"""Where in the epoch the loop over one loader is: counted by steps, kept for a checkpoint, gone back to after a restart.

A loader may be looped over several times an epoch. What a checkpoint needs to know of it is the loop in which the last step
was made, and how far that was; the loops before are not run again, but for those without steps (an evaluation's), which the
script runs again because it begins the epoch anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Place(ABC):
    """The place of one loader. What was handed to the training counts from its next `run.step()` on, never what was prefetched.

    A loader in whose loops no step is made has no position, and always begins anew.
    """

    def __init__(self, number: int) -> None:
        # Which of the run's loaders it is, in order of creation.
        self.number = str(number)
        # Whether steps are made in loops over this loader.
        self.trains = False
        self._epoch = -1
        # Which loop of the epoch is being run, and in which of those before it steps were made.
        self._loop = -1
        self._trained: list[int] = []
        self._is_within = False
        # Batches of this loop that an attempt before has trained on.
        self._before = 0
        self._handed_out = 0
        # What was handed out in this loop when the last step was made.
        self._stepped = 0
        # Behind the last step of this epoch.
        self._position: dict[str, Any] | None = None
        # The same, where a loop was left early and nothing has followed yet.
        self._left: dict[str, Any] | None = None
        # The restored position until its loop is entered; then whether this loop is that one.
        self._goal: dict[str, Any] | None = None
        self._resumed = False
        # Whether this loop was over already when the run was interrupted: there is nothing to iterate over.
        self.is_skipped = False

    @property
    def in_progress(self) -> bool:
        """Whether something was handed out behind the last step."""
        return self._handed_out > self._stepped

    @property
    def batch(self) -> int:
        """The number in its loop, from 0, of the batch that was handed out last."""
        return self._before + self._handed_out - 1

    def begin(self, epoch: int, *, is_within: bool = False) -> bool:
        """Enter a loop: at its beginning, behind the restored position, or at its end if a later one of this epoch is to be gone on with.

        Returns whether it is the loop of the restored position. `is_within` another loop, it counts only if steps are made in it: after
        a restart the other one is run from where it was, and so are those within.

        Raises:
            CheckpointMismatchError: the restored position does not fit what is there now.
        """
        if epoch != self._epoch:
            if self._epoch != -1:
                self._position = self._goal = None
            self._epoch, self._loop, self._trained = epoch, -1, []
        self._loop += 1
        self._is_within = is_within
        self._before = self._handed_out = self._stepped = 0
        self._left = None
        goal = self._goal
        self._resumed = goal is not None and self._loop >= goal["loop"]
        self.is_skipped = goal is not None and not self._resumed and self._loop in goal["trained_loops"]
        if self.is_skipped:
            self._trained.append(self._loop)
        elif self._resumed:
            self._goal, self._before = None, int(goal.get("batches", 0)) if goal is not None else 0
            self._enter(goal)
        else:
            self._enter(None)
        return self._resumed

    def advance(self) -> None:
        """Count one batch as handed to the training."""
        self._handed_out += 1

    def step(self) -> None:
        """Note that everything that was handed out is trained on."""
        self.trains = True
        self._stepped = self._handed_out
        if self._handed_out:
            self._position = self._marked(self._behind_step())

    def end(self, *, is_exhausted: bool = True) -> None:
        """Note that the loop is over, by its end or by a break: a loop in which steps were made is not entered again."""
        if self._stepped or (self._resumed and is_exhausted):
            self._left = None if is_exhausted else self.position(self._epoch)
            self._position = self._marked(self._over())
        if self._stepped or self._resumed:
            self._trained.append(self._loop)
        elif self._is_within and not self.is_skipped:
            self._loop -= 1
        self._handed_out = self._stepped = 0

    def stay(self) -> None:
        """Note that the script went on behind the loop that was left last: it is over, whatever comes."""
        self._left = None

    def go_back(self) -> None:
        """Note that the run ends where a loop was left, with nothing behind it: the next attempt goes on with the rest of it."""
        if self._left is not None:
            self._position, self._left = self._left, None

    def position(self, epoch: int) -> dict[str, Any] | None:
        """Return the position in `epoch` for a checkpoint; None without any step."""
        return self._position if epoch == self._epoch else None

    def forget(self) -> None:
        """Note that the epoch is over."""
        self._position = self._goal = self._left = None
        self._epoch = -1

    def restore(self, epoch: int, position: Mapping[str, Any]) -> None:
        """Go on behind a saved position once its loop is entered.

        Raises:
            CheckpointMismatchError: it does not fit what is there now.
        """
        self._check(position)
        self.trains = True
        self._epoch, self._loop, self._trained = epoch, -1, []
        self._position = {"loop": 0, "trained_loops": [], **position}
        self._goal = self._position

    def _marked(self, here: dict[str, Any]) -> dict[str, Any]:
        return {**here, "batches": self._before + self._handed_out, "loop": self._loop, "trained_loops": self._trained.copy()}

    @abstractmethod
    def _enter(self, position: Mapping[str, Any] | None) -> None:
        """Begin a loop behind a position, at its beginning without any."""

    @abstractmethod
    def _behind_step(self) -> dict[str, Any]:
        """Return the position behind all that was handed out."""

    @abstractmethod
    def _over(self) -> dict[str, Any]:
        """Return the position of a loop that is over."""

    @abstractmethod
    def _check(self, position: Mapping[str, Any]) -> None:
        """Refuse a position that does not fit."""
