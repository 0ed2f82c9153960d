"""Random draws for a sample (augmentation) depend on the seed, the epoch and the sample, and on nothing else.

Not on how many workers there are and which of them fetches it, nor on where the run was stopped: before a sample is fetched
the global generators of Python, NumPy and torch are seeded for it, as Grain does for each record; before a batch is put
together they are seeded for the batch. In the training's own process (num_workers=0) they are put back behind it, so
that the training draws what it would draw anyhow. What is drawn from generators of the dataset's own is not covered;
inside of `__getitem__`, `torch.initial_seed()` is the sample's seed to make one from.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, default_collate, get_worker_info

from hpcckpt.data.order import Batch
from hpcckpt.state.rng import derive_seed, drawing, seed_cpu


class _View:
    """Shows the attributes of the user's dataset as its own; those named hpcckpt_… are ours."""

    hpcckpt_dataset: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("hpcckpt_", "__")):  # not there yet: it is being unpickled
            raise AttributeError(name)
        return getattr(self.hpcckpt_dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn sets what is to be each worker's share.
        if name.startswith("hpcckpt_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.hpcckpt_dataset, name, value)


@dataclass(frozen=True)
class Whole:
    """A batch that is put together already, on its way through the DataLoader."""

    batch: Any


class SeededDataset(_View, Dataset[Any]):
    """A map-style dataset as a resumable loader gives it to its workers; `hpcckpt_dataset` is the user's."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.hpcckpt_dataset, self.hpcckpt_collate = dataset, collate

    def __len__(self) -> int:
        return len(self.hpcckpt_dataset)

    def __getitem__(self, index: int) -> Any:
        return self.hpcckpt_dataset[index]

    def __getitems__(self, indices: list[int]) -> "list[Any] | Whole":
        """Fetch the samples of a batch, each with generators seeded for it, and put them together with such for the batch."""
        if not isinstance(indices, Batch):  # not from our order
            return [self.hpcckpt_dataset[index] for index in indices]
        # Both in one, since in the training's own process generators are kept and put back, which takes longer than to seed them.
        with drawing() as seed:
            if _fetches_batches(self.hpcckpt_dataset):
                # It gives all samples of a batch at once, so they are seeded at once.
                seed(derive_seed(indices.seed, indices.first))
                samples = list(self.hpcckpt_dataset.__getitems__(list(indices)))
            else:
                samples = []
                for place, index in enumerate(indices, indices.first):
                    seed(derive_seed(indices.seed, place))
                    samples.append(self.hpcckpt_dataset[index])
            if self.hpcckpt_collate is not default_collate:
                seed(derive_seed(indices.seed, "batch", indices.first))
            return Whole(self.hpcckpt_collate(samples))


class SeededCollate:
    """Hands a batch on that is put together already, and puts others together."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: "list[Any] | Whole") -> Any:
        """Return the batch."""
        return samples.batch if isinstance(samples, Whole) else self.collate(samples)


class SeededStream(_View, IterableDataset[Any]):
    """An iterable dataset as a resumable loader gives it to its workers; `hpcckpt_dataset` is the user's.

    What a worker draws for a sample depends on the seed, the epoch, the rank, the worker, and how many it gave before. In
    the training's own process the training's generators are drawn from, and a checkpoint has their state.
    """

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.hpcckpt_dataset = dataset
        # Of the loop over it that comes next.
        self.hpcckpt_seed = 0
        self.hpcckpt_count = 0
        # What was loaded, until the first sample behind it: a dataset need not know before it is iterated over.
        self.hpcckpt_loaded: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.hpcckpt_dataset)

    def __iter__(self) -> Iterator[Any]:
        if self.hpcckpt_loaded is None:
            self.hpcckpt_count = 0
        worker = get_worker_info()
        samples = iter(self.hpcckpt_dataset)
        while True:
            if worker is not None:
                seed_cpu(derive_seed(self.hpcckpt_seed, worker.id, self.hpcckpt_count))
            try:
                sample = next(samples)
            except StopIteration:
                return
            finally:
                self.hpcckpt_loaded = None
            self.hpcckpt_count += 1
            yield sample

    def state_dict(self) -> dict[str, Any]:
        """Return where the last sample leaves it."""
        if self.hpcckpt_loaded is not None:
            return self.hpcckpt_loaded
        return {"count": self.hpcckpt_count, "dataset": self.hpcckpt_dataset.state_dict() if self.hpcckpt_count else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop go on there."""
        self.hpcckpt_count, self.hpcckpt_loaded = int(state["count"]), dict(state)
        if self.hpcckpt_count:
            self.hpcckpt_dataset.load_state_dict(copy.deepcopy(state["dataset"]))


def seeded(dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None) -> tuple[Dataset[Any], Callable[[list[Any]], Any] | None]:
    """Return dataset and collate_fn for a DataLoader whose batches are `Batch`es; both as they are where nothing can be drawn."""
    if collate is None and _draws_nothing(dataset):
        return dataset, None
    collate = collate or default_collate
    return SeededDataset(dataset, collate), SeededCollate(collate)


def _draws_nothing(dataset: Dataset[Any]) -> bool:
    if type(dataset) is ConcatDataset:
        return all(_draws_nothing(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset or (type(dataset) is Subset and _draws_nothing(dataset.dataset))


def _fetches_batches(dataset: Dataset[Any]) -> bool:
    """Whether it has a way of its own to fetch many samples at once; a Subset has it only for the dataset below."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(cast(Any, getattr(dataset, "__getitems__", None)))
