"""A DataLoader whose place in the epoch is counted in samples that were trained on."""

import functools
from collections.abc import Callable, Iterator, Sized
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from hpcckpt.data.plan import EpochPlan
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.signals import obey_parent_only
from hpcckpt.state.rng import derive_seed

T = TypeVar("T")

_OWNED = ("sampler", "batch_sampler", "generator")


class Cursor(Sampler[list[int]]):
    """The batch sampler of a resumable loader, and its position.

    The order depends on seed, epoch and loader number only. It yields batches ahead of the training (workers prefetch);
    what counts is what was handed to the training when it last said `run.step()`. A loader in whose loop no step is made (an
    evaluation's) has no position, and always begins anew.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, shuffle: bool, drop_last: bool, rank: int, world_size: int, seed: int, number: int
    ) -> None:
        self._shuffle = shuffle
        self._rank = rank
        self._seed = seed
        self._number = number
        self._epoch = 0
        self._plan = EpochPlan(num_samples, world_size, batch_size, 0, drop_last)
        self._handed_out = 0
        # Batches of this loop that were handed out when the last step was made.
        self._stepped = 0
        # Epoch, and samples of it behind the last step.
        self._position: tuple[int, int] | None = None
        self._resume_at: int | None = None
        # Whether steps are made in loops over this loader.
        self.trains = False
        self.generator = torch.Generator()

    @property
    def number(self) -> str:
        """Which of the run's loaders this is, in order of creation."""
        return str(self._number)

    @property
    def in_progress(self) -> bool:
        """Whether a batch was handed out behind the last step."""
        return self._handed_out > self._stepped

    def __len__(self) -> int:
        """Return the batches of a whole epoch, for schedulers and progress bars, wherever this one goes on."""
        return self._behind(0).num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of indices, from the position on."""
        plan, order = self._plan, self._order()
        for batch in range(plan.num_batches):
            share = plan.share(batch, self._rank)
            yield order[share.start : share.stop].tolist() if order is not None else list(share)

    def begin(self, epoch: int) -> None:
        """Go to the beginning of an epoch, or to the restored position if this is the first time since."""
        start, self._resume_at = (self._resume_at or 0 if self.position(epoch) else 0), None
        self._epoch = epoch
        self._handed_out = self._stepped = 0
        self._plan = self._behind(start)
        # Worker seeds come from here: the global generator must not depend on how often an epoch was begun.
        self.generator.manual_seed(derive_seed(self._seed, "workers", self._number, epoch))

    def advance(self) -> None:
        """Count one batch as handed to the training."""
        self._handed_out += 1

    def step(self) -> None:
        """Note that everything that was handed out is trained on."""
        self.trains = True
        self._stepped = self._handed_out
        if self._handed_out:
            self._position = self._epoch, self._plan.bounds(self._handed_out - 1)[1]

    def end(self) -> None:
        """Note that the loop is over, by its end or by a break: a loop in which steps were made is not entered again."""
        if self._stepped:
            self._position = self._epoch, self._plan.num_samples
        self._handed_out = self._stepped = 0

    def position(self, epoch: int) -> dict[str, int] | None:
        """Return the position in `epoch` for a checkpoint: samples that were trained on, over all ranks; None without any."""
        if self._position is None or self._position[0] != epoch:
            return None
        return {"consumed": self._position[1], "num_samples": self._plan.num_samples}

    def forget(self) -> None:
        """Note that the epoch is over."""
        self._position = self._resume_at = None

    def restore(self, epoch: int, position: dict[str, int]) -> None:
        """Go on behind a saved position when the epoch is begun next.

        Raises:
            CheckpointMismatchError: the dataset has another size now.
        """
        if position["num_samples"] != self._plan.num_samples:
            raise CheckpointMismatchError(
                f"the dataset of loader {self._number} has {self._plan.num_samples} samples, but had {position['num_samples']} when "
                "the epoch was interrupted: bring back the former data, or go on from the end of an epoch (resume.epoch=…)"
            )
        self.trains = True
        self._resume_at = position["consumed"]
        self._position = epoch, position["consumed"]

    def _behind(self, start: int) -> EpochPlan:
        plan = self._plan
        return EpochPlan(plan.num_samples, plan.world_size, plan.batch_size, start, plan.drop_last)

    def _order(self) -> torch.Tensor | None:
        """Return the epoch's order, None where it is the dataset's own; 8 bytes a sample."""
        if not self._shuffle:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", self._number, self._epoch))
        return torch.randperm(self._plan.num_samples, generator=generator)


def make_loader(
    dataset: Dataset[T],
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    rank: int,
    world_size: int,
    seed: int,
    number: int,
    **arguments: Any,
) -> "DataLoader[T]":
    """Return a DataLoader over this rank's share of `dataset`, with a Cursor for its batch sampler.

    Raises:
        UsageError: the dataset has no length, is smaller than the world, or an argument would replace the cursor.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError("run.loader: the dataset has no length, so its order cannot be resumed; give one with __len__ and __getitem__")
    for name in _OWNED:
        if name in arguments:
            raise UsageError(f"run.loader: {name}=… would replace the resumable order; leave it out, and use shuffle and batch_size")
    if batch_size < 1:
        raise UsageError(f"run.loader: batch_size={batch_size} must be at least 1")
    num_samples = len(cast(Sized, dataset))
    if num_samples < world_size:
        raise UsageError(f"run.loader: {num_samples} samples are too few for {world_size} ranks; ask for fewer tasks")
    cursor = Cursor(
        num_samples,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
        seed=seed,
        number=number,
    )
    init = functools.partial(_start_worker, arguments.pop("worker_init_fn", None))
    return DataLoader(dataset, batch_sampler=cursor, generator=cursor.generator, worker_init_fn=init, **arguments)


def _start_worker(users: Callable[[int], None] | None, worker_id: int) -> None:
    """Run in each worker before its first sample."""
    obey_parent_only()
    if users is not None:
        users(worker_id)
