"""`run.loader`: a DataLoader whose place in the epoch is known, of this rank's share, with draws that do not depend on workers."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

from hpcckpt.data.cursor import Cursor
from hpcckpt.data.order import Orders, of_batch_sampler, of_dataset, of_sampler
from hpcckpt.data.place import Place
from hpcckpt.data.samples import SeededStream, seeded
from hpcckpt.data.stream import StreamPlace
from hpcckpt.errors import UsageError
from hpcckpt.signals import obey_parent_only

T = TypeVar("T")

_NO_LENGTH = "give one with __len__ and __getitem__, or an IterableDataset with state_dict and load_state_dict"


@dataclass(frozen=True)
class Share:
    """This rank's part in a run, as a loader needs it."""

    rank: int
    world_size: int
    seed: int
    # Which of the run's loaders it is, in order of creation.
    number: int


@dataclass(frozen=True)
class BatchSize:
    """How many samples (or batches of a batch sampler) a rank takes at a time, and all ranks together."""

    # What the script asks for, for each rank.
    asked: int
    # What all ranks take together, as long as the script asks for the same: it decides how many steps an epoch has.
    together: int
    # What each rank takes, so that `together` is kept where it divides.
    per_rank: int

    @classmethod
    def kept(cls, asked: int, world_size: int, saved: Mapping[str, int] | None) -> "BatchSize":
        """Return what keeps the global batch of a checkpoint on any number of ranks."""
        if saved is None or saved.get("asked") != asked:
            return cls(asked, asked * world_size, asked)
        together = int(saved["together"])
        # What does not divide is rounded, not split unevenly: DDP weighs every rank the same.
        return cls(asked, together, max(1, (together + world_size // 2) // world_size))

    def state(self) -> dict[str, int]:
        """Return it for a checkpoint."""
        return {"asked": self.asked, "together": self.together}

    def note(self, number: int, world_size: int) -> str | None:
        """Return what a user has to know, if anything is not as the script says."""
        now = self.per_rank * world_size
        if now != self.together:
            return (
                f"loader {number}: the global batch is {now} now ({world_size} ranks x {self.per_rank}), not {self.together} as before, "
                f"which {world_size} ranks cannot share evenly"
            )
        if self.per_rank != self.asked:
            return f"loader {number}: the global batch of {now} is kept: each rank takes {self.per_rank} at a time, not {self.asked}"
        return None


def make_loader(
    dataset: Dataset[T],
    share: Share,
    *,
    batch_size: int | None = 1,
    shuffle: bool = False,
    drop_last: bool = False,
    sampler: Iterable[int] | None = None,
    batch_sampler: Iterable[list[int]] | None = None,
    saved_size: Mapping[str, int] | None = None,
    **arguments: Any,
) -> tuple["DataLoader[T]", Place, BatchSize]:
    """Return a DataLoader over this rank's share of `dataset`, its place, and the size of its batches.

    Raises:
        UsageError: what could not be gone on with exactly: no length and no state, or an argument that replaces the order.
    """
    _refuse(arguments)
    init = functools.partial(_start_worker, arguments.pop("worker_init_fn", None))
    if isinstance(dataset, IterableDataset):
        if shuffle or sampler is not None or batch_sampler is not None:
            raise UsageError("run.loader: an iterable dataset gives its own order: leave shuffle, sampler and batch_sampler out")
        return _stream_loader(dataset, share, batch_size, saved_size, {"drop_last": drop_last, "worker_init_fn": init, **arguments})
    if not hasattr(dataset, "__len__") and sampler is None and batch_sampler is None:
        raise UsageError(f"run.loader: the dataset has no length, so its order cannot be resumed; {_NO_LENGTH}")
    if batch_sampler is not None and (batch_size != 1 or shuffle or drop_last or sampler is not None):
        raise UsageError("run.loader: batch_sampler makes the batches: leave batch_size, shuffle, sampler and drop_last out")
    if sampler is not None and shuffle:
        raise UsageError("run.loader: sampler gives the order: leave shuffle out")
    size = _checked(batch_size, share, saved_size)
    orders = _orders(dataset, sampler, batch_sampler, shuffle=shuffle)
    cursor = Cursor(
        orders,
        batch_size=size.per_rank,
        drop_last=drop_last,
        rank=share.rank,
        world_size=share.world_size,
        seed=share.seed,
        number=share.number,
    )
    source, collate = seeded(dataset, arguments.pop("collate_fn", None))
    loader: DataLoader[Any] = DataLoader(
        source, batch_sampler=cast(Any, cursor), generator=cursor.generator, worker_init_fn=init, collate_fn=collate, **arguments
    )
    return loader, cursor, size


def _stream_loader(
    dataset: IterableDataset[Any], share: Share, batch_size: int | None, saved_size: Mapping[str, int] | None, arguments: dict[str, Any]
) -> tuple["DataLoader[Any]", Place, BatchSize]:
    if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
        raise UsageError(f"run.loader: a {type(dataset).__name__} has no length and no state, so its order cannot be resumed; {_NO_LENGTH}")
    if arguments.get("persistent_workers"):
        raise UsageError("run.loader: persistent_workers would keep the first epoch's state of an iterable dataset; leave it out")
    num_workers = int(arguments.get("num_workers", 0))
    # Without a batch_size the dataset gives batches of its own.
    size = _checked(1 if batch_size is None else batch_size, share, saved_size if batch_size is not None else None)
    stream = SeededStream(dataset)
    place = StreamPlace(stream, rank=share.rank, world_size=share.world_size, num_workers=num_workers, seed=share.seed, number=share.number)
    kind: type[DataLoader[Any]] = DataLoader
    if num_workers:
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError:
            raise UsageError(
                "run.loader: workers of an iterable dataset need torchdata's StatefulDataLoader, which knows where each of them is: "
                "pip install torchdata, or num_workers=0"
            ) from None
        kind = StatefulDataLoader
    loader = kind(stream, batch_size=None if batch_size is None else size.per_rank, generator=place.generator, **arguments)
    place.loader = loader if num_workers else None
    return loader, place, size


def _orders(dataset: Dataset[Any], sampler: Iterable[int] | None, batch_sampler: Iterable[list[int]] | None, *, shuffle: bool) -> Orders:
    if batch_sampler is not None:
        return of_batch_sampler(batch_sampler)
    if sampler is not None:
        return of_sampler(sampler)
    return of_dataset(len(cast(Sized, dataset)), shuffle=shuffle)


def _checked(batch_size: int | None, share: Share, saved: Mapping[str, int] | None) -> BatchSize:
    try:
        size = operator.index(batch_size) if batch_size is not None else 0  # NumPy has integers, too
    except TypeError:
        size = 0
    if size < 1:
        raise UsageError(f"run.loader: batch_size={batch_size!r} must be a whole number, at least 1")
    return BatchSize.kept(size, share.world_size, saved)


def _refuse(arguments: Mapping[str, Any]) -> None:
    if arguments.get("generator") is not None:
        raise UsageError("run.loader: generator=… would replace the resumable order; leave it out, the configuration's seed decides")
    if arguments.get("in_order") is False:
        raise UsageError("run.loader: in_order=False would hand batches over in an order that cannot be repeated; leave it out")


def _start_worker(users: Callable[[int], None] | None, worker_id: int) -> None:
    """Run in each worker before its first sample."""
    obey_parent_only()
    if users is not None:
        users(worker_id)
