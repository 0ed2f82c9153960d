"""Random draws for a sample (augmentation) depend on the seed, the epoch and the sample, and on nothing else.

Not on how many workers there are and which of them fetches it, nor on where the run was stopped: before a sample is fetched
the global generators of Python, NumPy and torch are seeded for it, as Grain does for each record; before a batch is put
together they are seeded for the batch. In the training's own process (num_workers=0) they are put back behind it, so
that the training draws what it would draw anyhow. What is drawn from generators of the dataset's own is not covered;
inside of `__getitem__`, `torch.initial_seed()` is the sample's seed to make one from.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, default_collate, get_worker_info

from hpcckpt.data.order import Batch
from hpcckpt.state.rng import derive_seed, drawing, seed_cpu


class _View:
    """Shows the attributes of the user's dataset as its own."""

    dataset: Any
    _own = frozenset({"dataset"})

    def __getattr__(self, name: str) -> Any:
        if name in self._own or name.startswith("__"):  # not there yet: it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn sets what is to be each worker's share.
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.dataset, name, value)


class Fetched(list[Any]):
    """The samples of a batch, on their way to be put together."""

    seed: int


class SeededDataset(_View, Dataset[Any]):
    """A map-style dataset as a resumable loader gives it to its workers; `dataset` is the user's."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Fetch the samples of a batch, each with generators seeded for it."""
        if not isinstance(indices, Batch):  # not from our order
            return [self.dataset[index] for index in indices]
        fetched = Fetched()
        fetched.seed = derive_seed(indices.seed, "batch", indices.first)
        with drawing(None) as seed:
            if _fetches_batches(self.dataset):
                # It gives all samples of a batch at once, so they are seeded at once.
                seed(derive_seed(indices.seed, indices.first))
                fetched += self.dataset.__getitems__(list(indices))
            else:
                for place, index in enumerate(indices, indices.first):
                    seed(derive_seed(indices.seed, place))
                    fetched.append(self.dataset[index])
        return fetched


class SeededCollate:
    """Puts the samples of a batch together with generators seeded for it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch."""
        if not isinstance(samples, Fetched):
            return self.collate(samples)
        with drawing(samples.seed):
            return self.collate(list(samples))


class SeededStream(_View, IterableDataset[Any]):
    """An iterable dataset as a resumable loader gives it to its workers; `dataset` is the user's.

    What a worker draws for a sample depends on the seed, the epoch, the rank, the worker, and how many it gave before. In
    the training's own process the training's generators are drawn from, and a checkpoint has their state.
    """

    _own = frozenset({"dataset", "seed", "_count", "_resumes"})

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        # Of the loop over it that comes next.
        self.seed = 0
        self._count = 0
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:
        self._count, self._resumes = self._count if self._resumes else 0, False
        worker = get_worker_info()
        samples = iter(self.dataset)
        while True:
            if worker is not None:
                seed_cpu(derive_seed(self.seed, worker.id, self._count))
            try:
                sample = next(samples)
            except StopIteration:
                return
            self._count += 1
            yield sample

    def state_dict(self) -> dict[str, Any]:
        """Return where the last sample leaves it."""
        return {"count": self._count, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop go on there."""
        self._count, self._resumes = int(state["count"]), True
        self.dataset.load_state_dict(state["dataset"])


def seeded(dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None) -> tuple[Dataset[Any], Callable[[list[Any]], Any] | None]:
    """Return dataset and collate_fn for a DataLoader whose batches are `Batch`es; both as they are where nothing can be drawn."""
    if collate is None and _draws_nothing(dataset):
        return dataset, None
    return SeededDataset(dataset), SeededCollate(collate or default_collate)


def _draws_nothing(dataset: Dataset[Any]) -> bool:
    if type(dataset) is ConcatDataset:
        return all(_draws_nothing(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset or (type(dataset) is Subset and _draws_nothing(dataset.dataset))


def _fetches_batches(dataset: Dataset[Any]) -> bool:
    """Whether it has a way of its own to fetch many samples at once; a Subset has it only for the dataset below."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(cast(Any, getattr(dataset, "__getitems__", None)))
