"""The order of an epoch: whose turn it is, from the dataset's own order, a permutation, or a sampler of the user's.

It is the same on every rank and attempt: a function of a seed. What is shared out over ranks are units: samples, or the
batches of a batch sampler. A listed order takes 8 bytes a sample (and 8 a batch), in the rank's main process alone.
"""

import functools
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data.distributed import DistributedSampler

from hpcckpt.errors import UsageError
from hpcckpt.state.rng import drawing


class Batch(list[int]):
    """Indices of the samples of one batch, and what random draws for them depend on: see `data.samples`."""

    def __init__(self, indices: Iterable[int], seed: int, first: int) -> None:
        super().__init__(indices)
        self.seed = seed
        # The place of the first one in the epoch's order; the others follow it.
        self.first = first


@dataclass(frozen=True)
class Order:
    """One epoch's order. `indices` None is the dataset's own; `offsets` None: each sample is a unit of its own."""

    num_units: int
    indices: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def digest(self) -> int:
        """Return a checksum of what is listed, to tell one order from another; a second for a billion samples."""
        listed = (part for part in (self.indices, self.offsets) if part is not None)
        return functools.reduce(lambda sum_, part: zlib.crc32(part.numpy(), sum_), listed, 0)  # type: ignore[arg-type]  # an array is a buffer

    def batch(self, units: range, seed: int) -> Batch:
        """Return the samples of consecutive units."""
        low, high = units.start, units.stop
        if self.offsets is not None:
            low, high = int(self.offsets[low]), int(self.offsets[high])
        return Batch(range(low, high) if self.indices is None else self.indices[low:high].tolist(), seed, low)


class Orders:
    """Gives the order of each epoch; `num_units` is how many units an epoch has, as far as that is known before."""

    def __init__(self, num_units: int, make: Callable[[int, int], Order], unit: str = "samples", *, may_vary: bool = False) -> None:
        self.num_units = num_units
        self.unit = unit
        # Whether an epoch may have more or fewer: it is up to the user's sampler.
        self.may_vary = may_vary
        # From a seed and the epoch to its order; what it draws on the way leaves no trace.
        self.of = make


def of_dataset(num_samples: int, *, shuffle: bool) -> Orders:
    """Return the dataset's own order, or a new permutation for each seed."""

    def permuted(seed: int, _epoch: int) -> Order:
        return Order(num_samples, torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)))

    return Orders(num_samples, permuted if shuffle else lambda _seed, _epoch: Order(num_samples))


def of_sampler(sampler: Iterable[int]) -> Orders:
    """Return the order in which a sampler names samples, run through once an epoch, the same on every rank.

    Raises:
        UsageError: it has no length, is a DistributedSampler, or gives something else than whole numbers.
    """
    _refuse_shares(sampler)

    def listed(seed: int, epoch: int) -> Order:
        indices = array("q")
        for index in _run(sampler, seed, epoch):
            _add("sampler", indices, (index,))
        return Order(len(indices), _tensor(indices))

    return Orders(_length("sampler", sampler), listed, may_vary=True)


def of_batch_sampler(sampler: Iterable[list[int]]) -> Orders:
    """Return the batches that a batch sampler gives, run through once an epoch, the same on every rank.

    Raises:
        UsageError: as `of_sampler`.
    """
    _refuse_shares(sampler)

    def listed(seed: int, epoch: int) -> Order:
        indices, offsets = array("q"), array("q", [0])
        for batch in _run(sampler, seed, epoch):
            _add("batch_sampler", indices, batch)
            offsets.append(len(indices))
        return Order(len(offsets) - 1, _tensor(indices), _tensor(offsets))

    return Orders(_length("batch_sampler", sampler), listed, "batches", may_vary=True)


def _run(sampler: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    """Run through a sampler that draws from `seed` alone: from its own generator, or from the global ones."""
    for part in _parts(sampler):
        set_epoch, generator = getattr(part, "set_epoch", None), getattr(part, "generator", None)
        if callable(set_epoch):
            set_epoch(epoch)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
    with drawing(seed):
        yield from sampler


def _parts(sampler: object) -> Iterator[object]:
    """Yield a sampler and those that it draws from, as a BatchSampler does from its `sampler`."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def _add(name: str, indices: "array[int]", more: Iterable[int]) -> None:
    # Apart from the sampler's own code: its errors are its own.
    try:
        indices.extend(iter(more))
    except TypeError as error:
        raise UsageError(f"run.loader: {name} must give whole numbers, indices of the dataset ({error})") from None


def _tensor(numbers: "array[int]") -> torch.Tensor:
    # Over the array's own memory: 80 bytes an index would go through a list.
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _length(name: str, sampler: object) -> int:
    try:
        return len(cast(Sized, sampler))
    except (TypeError, NotImplementedError):
        raise UsageError(
            f"run.loader: {name}: a {type(sampler).__name__} has no length, so an epoch has no end; give one with __len__"
        ) from None


def _refuse_shares(sampler: object) -> None:
    if any(isinstance(part, DistributedSampler) for part in _parts(sampler)):
        raise UsageError("run.loader: a DistributedSampler gives this rank's share already; leave it out, run.loader shares out by itself")
