"""Which loops over loaders are being run, and where in them the last step was made."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from hpcckpt.data.loader import BatchSize
from hpcckpt.data.place import Loop, Place
from hpcckpt.data.stream import StreamPlace
from hpcckpt.distributed import Collectives
from hpcckpt.errors import UsageError

# Why a checkpoint is not exact, as far as the run that takes it can tell.
_LEFT_OVER = (
    "batches came behind the last step of a loop: gradients that were accumulated from them begin anew, unless the script sets them to "
    "zero before it adds to them"
)

_MISSED = (
    "NOT bit-exact: this epoch was to go on with a loop over loader {}, and the script has not come to it again before it made steps in "
    "others: choose loaders by what is there after a restart, too"
)
_OVER = (
    "run.batches: this loop is over, since its epoch is, or another one over the same loader has begun; call run.batches anew in each "
    "epoch, and make two loaders for two loops at once"
)


class Loops:
    """The loaders of a run, in order of creation. A checkpoint's position is that of the last step, wherever it is saved.

    A restarted script comes from the beginning of the epoch to the first loop that is not over. So a run may stop where that one, the
    lead, asks for its next batch, and where the script is in no body of a loop with steps.
    """

    def __init__(self, ranks: Collectives | None = None) -> None:
        # Without them it is the only rank.
        self._ranks = ranks
        self._loaders: list[tuple[DataLoader[Any], Place]] = []
        self._sizes: list[BatchSize] = []
        # So many are made before the loop over epochs.
        self._lasting: int | None = None
        # The loader whose loop was to be gone on with, where steps were made in another one before.
        self._missed: str | None = None
        # Batches are asked for in the thread that answers to signals.
        self._thread = threading.get_ident()
        # Whether a loop with steps has ended behind batches that no step followed.
        self._has_left_over = False
        # Steps of this epoch that were made in no loop.
        self._unplaced_steps = 0
        # Those whose loops are being run, in the order in which they were begun.
        self._running: list[Place] = []
        # A loop that was left early, where nobody knows whether those that were begun since its last batch were in its body or behind it.
        self._unclear: Place | None = None
        # The loader in whose loop the last step of this epoch was made; of several, the lead.
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

    def place_of(self, loader: object) -> Place:
        """Return the place of a loader.

        Raises:
            UsageError: it is none of these.
        """
        for known, place in self._loaders:
            if known is loader:
                return place
        raise UsageError(
            "run.batches: this DataLoader was not made by run.loader, or in an epoch that is over, so its position is unknown; make it "
            "with run.loader, before run.epochs or in each epoch"
        )

    def restore(self, epoch: int, loaders: Mapping[str, dict[str, Any]], last: str | None, unplaced_steps: int) -> None:
        """Put all loaders, also those that are yet to come, where a checkpoint within `epoch` has them."""
        self._restored = epoch, loaders
        self._last = self._resuming = last
        self._unplaced_steps = unplaced_steps
        for place in self.places:
            self._put(place)

    def create(self, loader: object, epoch: int) -> tuple[Place, Loop]:
        """Return the place of a loader, and a new loop over it. Every rank must call it.

        Raises:
            UsageError: the loader is none of these.
        """
        place = self.place_of(loader)
        return place, place.create(epoch, [other for other in self._running if other is not place])

    def begin(self, place: Place, loop: Loop, epoch: int) -> bool:
        """Note that a loop begins; returns whether it is the one in which the restored checkpoint's last step was made.

        Every rank must call it.

        Raises:
            UsageError: its epoch is over; another thread; the ranks have samplers that give each another order.
            CheckpointMismatchError: as `Place.begin`.
        """
        if threading.get_ident() != self._thread:
            raise UsageError(
                "run.batches: ask for batches in the thread that has made the run, since a stop happens there; to fetch ahead, use "
                "num_workers and prefetch_factor"
            )
        if loop.epoch != epoch:
            raise UsageError(_OVER)
        is_goal = self._begin(place, loop)
        self.stay()
        self._running = [*(other for other in self._running if other is not place), place]
        resumes = is_goal and self._resuming == place.number
        if resumes:
            self._resuming = None
        return resumes

    def _begin(self, place: Place, loop: Loop) -> bool:
        over = {other.number for other in self.places if other.is_resumed and other.loop is None}
        if self._ranks is None or not place.may_differ:
            return place.begin(loop, over)
        begun = self._ranks.collect(lambda: (place.begin(loop, over), place.digest))
        if len({digest for _, digest in begun}) > 1:
            raise UsageError(
                f"run.loader: the sampler of loader {place.number} gives another order on each rank, so samples would come twice or never: "
                "let it draw from the global generators or from a torch.Generator called `generator`"
            )
        return begun[self._ranks.rank][0]

    def refuse_if_over(self, place: Place, loop: Loop) -> None:
        """Refuse to go on with an iterator that was kept beyond its loop.

        Raises:
            UsageError: the epoch has ended since, or another loop over the same loader has begun.
        """
        if place.loop is not loop:
            raise UsageError(_OVER)

    def end(self, place: Place, *, is_exhausted: bool) -> bool:
        """Note that a loop is over; returns whether the state behind it is that behind the last step: it was its lead."""
        is_lead = place.has_stepped and place.leads
        if is_lead and not is_exhausted and any(other.began_in(place) for other in self.places):
            self._unclear = place
        self._has_left_over |= place.has_stepped and place.in_progress
        self._running.remove(place)
        place.end(is_exhausted=is_exhausted)
        return is_lead and not self.is_repeating

    def step(self) -> None:
        """Note an optimizer step in all loops that are being run."""
        self.stay()
        self._has_left_over = False
        # An iterator that was left in a variable has a loop, but no part in the step.
        moved = [place for place in self._running if place.in_progress]
        lead = next((place for place in self._running if place.trains or place in moved), None)
        for place in moved:
            place.step(None if place is lead else lead)
        self._last = None if lead is None else lead.number
        if lead is None:
            self._unplaced_steps += 1
        elif self._resuming is not None:
            self._missed, self._resuming = self._resuming, None

    @property
    def leads(self) -> list[Place]:
        """The places in the bodies of whose loops the script is: a restart comes to where the first of them asks for a batch."""
        return [place for place in self._running if place.leads]

    def waits(self, place: Place | None = None) -> str | None:
        """Return why a run may not stop here, where this place asks for a batch, or none does; None where it may."""
        if self._unclear is not None:
            return (
                f"a stop waits for the end of the epoch: the loop over loader {self._unclear.number} was left early, and nobody knows "
                "whether the loops since its last batch were in its body or behind it"
            )
        leads = self.leads
        if not leads or leads == [place]:
            return None
        return f"a stop waits for the next batch of loader {leads[0].number}, or the end of its loop, whose body this is"

    def reasons(self, has_gradients: Callable[[], bool]) -> list[str]:
        """Return why a checkpoint cannot be gone on with exactly; what costs time is asked for only where it matters."""
        return [_LEFT_OVER] if self._has_left_over and has_gradients() else []

    def stay(self) -> None:
        """Note that something followed the loops that were left: see `Place.stay`."""
        for place in self.places:
            place.stay()

    def go_back(self) -> None:
        """Note that the run is left: see `Place.go_back`."""
        if self._unclear is not None and self._unclear.is_left:
            self._unclear = None
        for place in self.places:
            place.go_back()

    def end_epoch(self) -> str | None:
        """Forget the epoch's positions; returns why it was not gone on with exactly, if it was not."""
        missed = self._missed or self._resuming
        self._last = self._resuming = self._missed = None
        self._unplaced_steps = 0
        self._restored = (0, {})
        self._running.clear()
        self._unclear = None
        for place in self.places:
            place.forget()
        if self._lasting is not None:
            del self._loaders[self._lasting :], self._sizes[self._lasting :]
        return None if missed is None else _MISSED.format(missed)

    def settle(self) -> None:
        """Note that the loop over epochs begins: loaders that are made from now on are those of one epoch."""
        self._lasting = len(self._loaders)

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
