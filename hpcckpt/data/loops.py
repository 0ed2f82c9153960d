"""Which loops over loaders are being run, and where in them the last step was made."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from hpcckpt.data.loader import BatchSize
from hpcckpt.data.place import Place
from hpcckpt.data.stream import StreamPlace

# Why a checkpoint within an epoch is not exact, as far as the run that takes it can tell.
NESTED = (
    "steps are made in a loop within the body of another one, whose batch counts as trained on from the first of them: after a restart "
    "the rest of the inner loop is left out; make one loop of them"
)
CUT = "saved at a run.poll in the body of a loop with steps: what is left of that body is not run after a restart"


class Loops:
    """The loaders of a run, in order of creation. A checkpoint's position is that of the last step, wherever it is saved."""

    def __init__(self) -> None:
        self._loaders: list[tuple[DataLoader[Any], Place]] = []
        self._sizes: list[BatchSize] = []
        # Of a loop that began in another one's body, those it is in.
        self._around: dict[Place, list[Place]] = {}
        # Why this epoch cannot be gone on with exactly.
        self._reasons: list[str] = []
        # Steps of this epoch that were made in no loop.
        self._unplaced_steps = 0
        # Those whose loops are being run, the outermost first.
        self._running: list[Place] = []
        # The loader in whose loop the last step of this epoch was made.
        self._last: str | None = None
        # The same of the restored checkpoint, until that loop is entered.
        self._resuming: str | None = None
        self._restored: tuple[int, Mapping[str, dict[str, Any]]] = (0, {})

    def __len__(self) -> int:
        """Return how many loaders there are."""
        return len(self._loaders)

    @property
    def places(self) -> list[Place]:
        """The places of all loaders."""
        return [place for _, place in self._loaders]

    @property
    def is_repeating(self) -> bool:
        """Whether the script runs again, after a restart, what it ran in this epoch before the loop that is gone on with."""
        return self._resuming is not None

    def add(self, loader: "DataLoader[Any]", place: Place, size: BatchSize) -> None:
        """Take a loader in, and put it where the restored checkpoint has it."""
        self._loaders.append((loader, place))
        self._sizes.append(size)
        self._put(place)

    def place_of(self, loader: object) -> Place | None:
        """Return the place of a loader; None if it is none of these."""
        return next((place for known, place in self._loaders if known is loader), None)

    def batch_of(self, loader: object) -> int:
        """Return the number of the batch that was handed out last by a loader of these; see `Place.batch`."""
        place = self.place_of(loader)
        return -1 if place is None else place.batch

    def restore(self, epoch: int, loaders: Mapping[str, dict[str, Any]], last: str | None, unplaced_steps: int) -> None:
        """Put all loaders, also those that are yet to come, where a checkpoint within `epoch` has them."""
        self._restored = epoch, loaders
        self._last = self._resuming = last
        self._unplaced_steps = unplaced_steps
        for place in self.places:
            self._put(place)

    def begin(self, place: Place, epoch: int) -> bool:
        """Note that a loop begins; returns whether it is the one in which the restored checkpoint's last step was made."""
        is_goal = place.begin(epoch, is_within=bool(self._running))
        self._around[place] = [other for other in self._running if other.in_progress]
        self.stay()
        self._running.append(place)
        resumes = is_goal and self._resuming == place.number
        if resumes:
            self._resuming = None
        return resumes

    def end(self, place: Place, *, is_exhausted: bool) -> None:
        """Note that a loop is over; one that was not left before its epoch's end (an iterator kept in a variable) was over then."""
        if place in self._running:
            self._running.remove(place)
            place.end(is_exhausted=is_exhausted)

    def step(self) -> None:
        """Note an optimizer step in all loops that are being run."""
        self.stay()
        # An iterator that was left in a variable has a loop, but no part in the step.
        moved = [place for place in self._running if place.in_progress]
        for place in moved:
            place.step()
        if moved:
            self._last = moved[0].number
            if any(outer.trains and outer not in moved for outer in self._around.get(moved[0], ())):
                self._reasons = [NESTED]
        elif not self._running:
            self._last = None
            self._unplaced_steps += 1

    @property
    def is_within_body(self) -> bool:
        """Whether what is run now is in the body of a loop in which steps are made."""
        return any(place.trains for place in self._running)

    @property
    def reasons(self) -> list[str]:
        """Why a checkpoint of this epoch cannot be gone on with exactly."""
        return self._reasons.copy()

    def stay(self) -> None:
        """Note that something followed the loops that were left: see `Place.stay`."""
        for place in self.places:
            place.stay()

    def go_back(self) -> None:
        """Note that the run is left: see `Place.go_back`."""
        for place in self.places:
            place.go_back()

    def end_epoch(self) -> None:
        """Forget the epoch's positions."""
        self._last = self._resuming = None
        self._unplaced_steps = 0
        self._restored = (0, {})
        self._running.clear()
        self._around.clear()
        self._reasons.clear()
        for place in self.places:
            place.forget()

    @property
    def is_between_batches(self) -> bool:
        """Whether no batch was handed to the training behind its last step.

        Loops without steps (an evaluation's) do not matter, but which those are is known only when one has had a step.
        """
        known = any(place.trains for place in self.places)
        return not any(place.in_progress and (place.trains or not known) for place in self._running)

    def data_state(self, epoch: int) -> dict[str, Any]:
        """Return what a checkpoint says of all loaders, the same on every rank: positions within `epoch`, sizes of batches."""
        positions = {place.number: place.position(epoch) for place in self.places}
        return {
            "loaders": {number: here for number, here in positions.items() if here is not None},
            "last_loader": self._last,
            "unplaced_steps": self._unplaced_steps,
            "batch_sizes": {place.number: size.state() for place, size in zip(self.places, self._sizes, strict=True)},
        }

    def resized(self, saved: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Return which loaders the script gives another batch size than the one a checkpoint was saved with."""
        pairs = [(number, saved.get(str(number), {}).get("asked", size.asked), size.asked) for number, size in enumerate(self._sizes)]
        return [f"loader {number}: batch_size {then} then, {now} now" for number, then, now in pairs if then != now]

    def streams(self, epoch: int) -> dict[str, Any]:
        """Return what of the positions is this rank's alone: the state of its iterable datasets."""
        states = {place.number: place.state(epoch) for place in self.places if isinstance(place, StreamPlace)}
        return {number: state for number, state in states.items() if state is not None}

    def _put(self, place: Place) -> None:
        epoch, loaders = self._restored
        if place.number in loaders:
            place.restore(epoch, loaders[place.number])
