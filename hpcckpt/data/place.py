"""Where in the epoch the loop over one loader is: counted by steps, kept for a checkpoint, gone back to after a restart.

A loader may be looped over several times an epoch. What a checkpoint needs to know of it is the loop in which the last step
was made, and how far that was; the loops before are not run again, but for those without steps (an evaluation's), which the
script runs again because it begins the epoch anew.

Steps may be made in several loops at once: in step, by turns, one in the body of another. One of them is the lead: the first that
asks for a batch, where the epoch is begun anew. Loops that were made before it, as an iterator is, are counted as others are; those
that are made in its body are not, because after a restart the lead goes on from where it was: they go on in its body, or are over.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Loop:
    """A call of `run.batches`; where it is made tells a restarted script's loops from each other. Without its own place: no cycles."""

    epoch: int
    # Which of the epoch's loops over its loader it is; None in the body of another one.
    number: int | None
    # The loops that were being run then, and which of their batches it was.
    around: Mapping["Place", tuple["Loop | None", int]]

    @property
    def is_within(self) -> bool:
        """Whether one of these is still being run, and steps are made in it."""
        return any(other.trains and other.loop is loop for other, (loop, _) in self.around.items())


class Place(ABC):
    """The place of one loader. What was handed to the training counts from its next `run.step()` on, never what was prefetched.

    A loader in whose loops no step is made has no position, and always begins anew.
    """

    def __init__(self, number: int) -> None:
        # Which of the run's loaders it is, in order of creation.
        self.number = str(number)
        # Whether steps are made in loops over this loader.
        self.trains = False
        # The loop that is being run; the one that is or was.
        self.loop: Loop | None = None
        self._latest: Loop | None = None
        # Of an order that may come out differently on each rank, its checksum; see `may_differ`.
        self.digest: int | None = None
        self._epoch = -1
        # How many loops there were in this epoch, and in which of them steps were made.
        self._count = 0
        self._trained: list[int] = []
        # The lead of the steps that are made in this loop, where that is another one.
        self._lead: Place | None = None
        # Batches of this loop that an attempt before has trained on.
        self._before = 0
        self._handed_out = 0
        # What was handed out in this loop when the last step was made.
        self._stepped = 0
        # Behind the last step of this epoch.
        self._position: dict[str, Any] | None = None
        # The same, where a loop was left early and nothing has followed yet.
        self._left: dict[str, Any] | None = None
        # The restored position until its loop is entered; whether this loop is that one.
        self._goal: dict[str, Any] | None = None
        self.is_resumed = False
        # Whether this loop was over already when the run was interrupted: there is nothing to iterate over.
        self.is_skipped = False

    @property
    def in_progress(self) -> bool:
        """Whether something was handed out behind the last step."""
        return self._handed_out > self._stepped

    @property
    def has_stepped(self) -> bool:
        """Whether steps were made in this loop."""
        return self._stepped > 0 or self.is_resumed

    @property
    def leads(self) -> bool:
        """Whether steps are made in loops over this loader, and in this one not in the body of another."""
        return self.trains and self._lead is None

    @property
    def is_left(self) -> bool:
        """Whether the loop was left before its end, and nothing has followed yet."""
        return self._left is not None

    @property
    def may_differ(self) -> bool:
        """Whether the order of an epoch is the user's own, so that ranks have to compare what they have."""
        return False

    @property
    def batch(self) -> int:
        """The number in its loop, from 0, of the batch that was handed out last."""
        return self._before + self._handed_out - 1

    def create(self, epoch: int, around: Iterable["Place"] = ()) -> Loop:
        """Return a new loop, while those over other loaders are being run."""
        if epoch != self._epoch:
            if self._epoch != -1:
                self._position = self._goal = None
            self._epoch, self._count, self._trained = epoch, 0, []
        loop = Loop(epoch, None, {other: (other.loop, other.batch) for other in around})
        self._number(loop)
        return loop

    def _number(self, loop: Loop) -> None:
        if loop.number is None and not loop.is_within:
            loop.number, self._count = self._count, self._count + 1

    def begin(self, loop: Loop, over: Collection[str] = ()) -> bool:
        """Enter a loop: at its beginning, behind the restored position, or at its end if a later one of this epoch is to be gone on with.

        Returns whether it is the loop of the restored position. `over` are the loaders whose restored loops have come to their end.

        Raises:
            CheckpointMismatchError: the restored position does not fit what is there now.
        """
        self._number(loop)  # what it was made in may be over
        self.loop = self._latest = loop
        self._before = self._handed_out = self._stepped = 0
        self._left = self._lead = None
        goal = self._goal
        self.is_resumed = goal is not None and self._is_reached(goal, loop, over)
        self.is_skipped = not self.is_resumed and loop.number in self._trained
        if self.is_resumed and goal is not None:
            self._goal, self._before = None, int(goal.get("batches", 0))
            self._lead = next((other for other in loop.around if other.number == goal.get("within")), None)
            self._enter(goal)
        elif not self.is_skipped:
            self._enter(None)
        return self.is_resumed

    def _is_reached(self, goal: Mapping[str, Any], loop: Loop, over: Collection[str]) -> bool:
        lead = goal.get("within")
        if lead is None:
            return bool(loop.number == goal["loop"])
        if self._is_end(goal):
            return False
        # In the lead's body; or in a variable that had it there, and is asked behind the lead's end.
        is_kept = lead in over and loop.number in goal["trained_loops"]
        return is_kept or any(other.number == lead and other.is_resumed for other in loop.around)

    def began_in(self, other: "Place") -> bool:
        """Whether a loop with steps was begun since a batch of the other one was handed out, and before the next."""
        loop = self._latest
        return loop is not None and self._lead is other and loop.around.get(other) == (other.loop, other.batch)

    def advance(self) -> None:
        """Count one batch as handed to the training."""
        self._handed_out += 1

    def step(self, lead: "Place | None" = None) -> None:
        """Note that everything that was handed out is trained on; in steps whose lead is another place."""
        self.trains = True
        self._lead = lead
        self._stepped = self._handed_out
        if self._handed_out:
            self._position = self._marked(self._behind_step(), is_over=False)

    def end(self, *, is_exhausted: bool = True) -> None:
        """Note that the loop is over, by its end or by a break: a loop in which steps were made is not entered again."""
        if self.has_stepped:
            self._left = None if is_exhausted else self.position(self._epoch)
            self._position = self._marked(self._over(), is_over=True)
        loop, self.loop = self.loop, None
        if loop is not None and loop.number is not None:
            is_within = self._is_within if self.has_stepped else bool(loop.around) and not self.is_skipped
            if self.has_stepped and not is_within:
                self._trained = [*(number for number in self._trained if number != loop.number), loop.number]
            elif is_within and loop.number == self._count - 1:
                self._count -= 1
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
        self._position = self._goal = self._left = self._lead = self.loop = self._latest = None
        self.is_resumed = False
        self._epoch = -1

    def restore(self, epoch: int, position: Mapping[str, Any]) -> None:
        """Go on behind a saved position once its loop is entered.

        Raises:
            CheckpointMismatchError: it does not fit what is there now.
        """
        self._check(position)
        self.trains = True
        self._position = self._goal = goal = {"loop": 0, "trained_loops": [], "is_over": False, **position}
        over = [goal["loop"]] if goal["is_over"] and "within" not in goal else []
        self._epoch, self._count, self._trained = epoch, 0, [*goal["trained_loops"], *over]

    @property
    def _is_within(self) -> bool:
        return self._lead is not None and self._latest is not None and self._lead in self._latest.around

    def _marked(self, here: dict[str, Any], *, is_over: bool) -> dict[str, Any]:
        number = 0 if self._latest is None or self._latest.number is None else self._latest.number
        within = {"within": self._lead.number} if self._is_within and self._lead is not None else {}
        before = [other for other in self._trained if other != number or within]
        loop = {"loop": number, "trained_loops": before, "is_over": is_over, **within}
        return {**here, "batches": self._before + self._handed_out, **loop}

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
    def _is_end(self, position: Mapping[str, Any]) -> bool:
        """Whether nothing is known to follow behind a position."""

    @abstractmethod
    def _check(self, position: Mapping[str, Any]) -> None:
        """Refuse a position that does not fit."""
