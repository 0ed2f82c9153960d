"""What is drawn for a sample depends on the seed, the epoch and the sample; not on workers, prefetching or interruptions."""

import functools
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, RandomSampler, Subset, TensorDataset, default_collate, get_worker_info

from hpcckpt.data import Share, make_loader
from hpcckpt.data.order import Batch

# A machine of two cores is no finding.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

SIZE = 11


def draw():
    return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002 - what users' datasets draw from


class Noisy(Dataset):
    """A sample is its index and what is drawn for it."""

    classes = ("cat", "dog")

    def __init__(self, size=SIZE):
        self.size, self.scale = size, 1

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return [index, *draw(), torch.initial_seed()]


class NoisyBatches(Noisy):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Seen(Noisy):
    """A sample is its index and what this process's dataset says of itself."""

    def __getitem__(self, index):
        return [index, self.scale]


class Raising(Noisy):
    def __getitem__(self, index):
        draw()
        raise OSError(f"sample {index} is damaged")


def noisy_collate(samples):
    return [*default_collate(samples), *draw()]


def raising_collate(_samples):
    draw()
    raise OSError("does not fit together")


def scaled(worker_id, by=5):
    get_worker_info().dataset.scale = by + 0 * worker_id


def loader_of(dataset=None, *, rank=0, world_size=1, seed=7, number=0, **arguments):
    dataset = Noisy() if dataset is None else dataset
    return make_loader(dataset, Share(rank, world_size, seed, number), **{"batch_size": 2, "shuffle": True, **arguments})[0]


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def trained(loader, epoch, batches=None, position=None):
    """Train as `run.batches` and `run.step` do; return what was seen."""
    cursor = loader.batch_sampler
    if position is not None:
        cursor.restore(epoch, position)
    cursor.begin(cursor.create(epoch))
    seen = []
    for batch in itertools.islice(loader, batches):
        cursor.advance()
        cursor.step()
        seen.append([plain(part) for part in batch])
    return seen


def samples(batches):
    """Return, for each index, what was seen of it."""
    return {sample[0]: sample for batch in batches for sample in zip(*batch, strict=True)}


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


DATASETS = {
    "plain": Noisy,
    "subset": lambda: Subset(Noisy(20), range(4, 15)),
    "subset of a subset": lambda: Subset(Subset(Noisy(20), range(2, 18)), range(11)),
    "concatenated": lambda: ConcatDataset([Noisy(5), Noisy(6)]),
    "subset of concatenated": lambda: Subset(ConcatDataset([Noisy(8), Noisy(8)]), range(0, 16, 2)),
    "batches": NoisyBatches,
    "subset of batches": lambda: Subset(NoisyBatches(20), range(11)),
}
WORKERS = {
    "one": {"num_workers": 1},
    "three": {"num_workers": 3},
    "that look far ahead": {"num_workers": 2, "prefetch_factor": 5},
    "that stay": {"num_workers": 2, "persistent_workers": True},
    "that look one ahead": {"num_workers": 3, "prefetch_factor": 1},
}


@functools.cache
def expected(name="plain", collate=None):
    return [trained(loader_of(DATASETS[name](), collate_fn=collate), epoch) for epoch in range(3)]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_draws_are_those_of_no_workers_with(workers):
    loader = loader_of(**WORKERS[workers], collate_fn=noisy_collate)
    assert [trained(loader, epoch) for epoch in range(3)] == expected(collate=noisy_collate)


@pytest.mark.parametrize("name", DATASETS)
def test_the_draws_are_those_of_no_workers_for_a_dataset_that_is(name):
    loader = loader_of(DATASETS[name](), num_workers=2, persistent_workers=True)
    assert [trained(loader, epoch) for epoch in range(2)] == expected(name)[:2]


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_the_draws_are_the_same_in_workers_that_begin_from_nothing(context):
    loader = loader_of(num_workers=1, multiprocessing_context=context, collate_fn=noisy_collate, persistent_workers=True)
    assert [trained(loader, epoch) for epoch in range(3)] == expected(collate=noisy_collate)


@pytest.mark.parametrize("done", range(1, 7))
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_anywhere_the_draws_are_those_of_an_epoch_that_was_not(done, workers):
    whole = expected(collate=noisy_collate)[1]
    loader = loader_of(collate_fn=noisy_collate, num_workers=workers)
    begun = trained(loader, 1, done)
    rest = trained(loader_of(collate_fn=noisy_collate, num_workers=workers), 1, position=loader.batch_sampler.position(1))
    assert begun + rest == whole


def test_workers_that_stay_draw_the_same_behind_a_break():
    loader = loader_of(num_workers=2, persistent_workers=True)
    for epoch, batches in enumerate((2, 1, None)):
        assert trained(loader, epoch, batches) == expected()[epoch][:batches]
        loader.batch_sampler.end(is_exhausted=False)


@pytest.mark.parametrize("name", [name for name in DATASETS if "batches" not in name])
def test_the_draws_for_a_sample_do_not_depend_on_the_batch_or_the_ranks(name):
    whole = samples(expected(name)[2])
    assert samples(trained(loader_of(DATASETS[name](), batch_size=5), 2)) == whole
    shares = [samples(trained(loader_of(DATASETS[name](), rank=rank, world_size=3), 2)) for rank in range(3)]
    assert shares[0] | shares[1] | shares[2] == whole


def test_no_draw_comes_twice_over_samples_epochs_loaders_and_seeds():
    seen = [sample for batches in expected() for batch in batches for sample in zip(*batch, strict=True)]
    for change in ({"number": 1}, {"seed": 8}):
        seen += samples(trained(loader_of(**change), 0)).values()
    for column in range(1, 5):
        assert len({sample[column] for sample in seen}) == len(seen) == 5 * SIZE


def test_a_sample_that_comes_twice_in_an_epoch_is_drawn_for_anew():
    sampler = RandomSampler(range(3), replacement=True, num_samples=60)
    for workers in (0, 2):
        batches = trained(loader_of(Noisy(3), sampler=sampler, shuffle=False, num_workers=workers), 0)
        seen = [sample for batch in batches for sample in zip(*batch, strict=True)]
        assert {sample[0] for sample in seen} == {0, 1, 2}
        assert len({sample[1] for sample in seen}) == 60


def test_putting_a_batch_together_draws_apart_from_its_samples():
    batches = expected(collate=noisy_collate)[0]
    drawn = [batch[-3] for batch in batches]
    assert len({*drawn, *(value for batch in batches for value in batch[1])}) == len(drawn) + SIZE


def test_a_dataset_that_fetches_batches_is_asked_for_them():
    asked = []

    class Asked(NoisyBatches):
        def __getitems__(self, indices):
            asked.append(indices)
            return super().__getitems__(indices)

    trained(loader_of(Asked(), shuffle=False), 0)
    assert asked == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert {type(indices) for indices in asked} == {list}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", DATASETS)
def test_the_training_draws_as_if_there_were_no_data(name, workers):
    before = generators()
    trained(loader_of(DATASETS[name](), num_workers=workers, collate_fn=noisy_collate), 0)
    assert generators() == before


@pytest.mark.parametrize("arguments", [{"dataset": Raising()}, {"collate_fn": raising_collate}], ids=["dataset", "collate_fn"])
def test_the_training_draws_as_before_also_where_a_sample_fails(arguments):
    before = generators()
    with pytest.raises(OSError, match=r"is damaged|does not fit"):
        trained(loader_of(**arguments), 0)
    assert generators() == before


PLAIN = {
    "tensors": lambda: TensorDataset(torch.arange(6)),
    "subset of tensors": lambda: Subset(TensorDataset(torch.arange(9)), range(6)),
    "concatenated tensors": lambda: ConcatDataset([TensorDataset(torch.arange(3)), Subset(TensorDataset(torch.arange(9)), [4, 5, 6])]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_where_nothing_can_be_drawn_the_dataset_is_left_as_it_is(name):
    dataset = PLAIN[name]()
    loader = loader_of(dataset)
    assert loader.dataset is dataset
    assert loader.collate_fn is default_collate
    assert len(trained(loader, 0)) == 3


class NoisyTensors(TensorDataset):
    def __getitem__(self, index):
        return [*super().__getitem__(index), *draw()]


def test_a_kind_of_tensor_dataset_that_draws_is_not_taken_for_one_that_does_not():
    for dataset in (NoisyTensors(torch.arange(SIZE)), Subset(NoisyTensors(torch.arange(SIZE)), range(SIZE))):
        assert trained(loader_of(dataset, num_workers=2), 0) == trained(loader_of(dataset), 0)


def test_with_a_collate_fn_tensors_are_drawn_for_too():
    loaders = [loader_of(TensorDataset(torch.arange(SIZE)), collate_fn=noisy_collate, num_workers=workers) for workers in (0, 2)]
    assert trained(loaders[0], 0) == trained(loaders[1], 0)


def test_attributes_are_those_of_the_dataset():
    dataset = Noisy()
    loader = loader_of(dataset)
    assert (loader.dataset.classes, loader.dataset.size, len(loader.dataset)) == (("cat", "dog"), SIZE, SIZE)
    assert loader.dataset[3][0] == 3
    loader.dataset.scale = 2
    assert dataset.scale == 2
    with pytest.raises(AttributeError, match="'Noisy' object has no attribute 'colour'"):
        _ = loader.dataset.colour
    assert not hasattr(loader.dataset, "__array__")


def test_attributes_of_a_subset_are_its_own():
    inner = Noisy(20)
    loader = loader_of(Subset(inner, range(4)))
    assert loader.dataset.dataset is inner
    assert list(loader.dataset.indices) == [0, 1, 2, 3]
    loader.dataset.dataset.scale = 3
    assert inner.scale == 3


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_init_fn_sets_what_its_workers_datasets_have(context):
    loader = loader_of(Seen(), num_workers=1, worker_init_fn=scaled, multiprocessing_context=context)
    assert {scale for batch in trained(loader, 0) for scale in batch[1]} == {5}
    assert loader.dataset.scale == 1


def test_it_goes_through_pickle():
    before = loader_of(collate_fn=noisy_collate)
    dataset, collate = pickle.loads(pickle.dumps((before.dataset, before.collate_fn)))
    batch = pickle.loads(pickle.dumps(Batch([3, 1], 99, 4)))
    assert (batch, batch.seed, batch.first) == ([3, 1], 99, 4)
    assert dataset.classes == ("cat", "dog")
    again, first = (noisy(given.__getitems__(batch)) for given, noisy in ((dataset, collate), (before.dataset, before.collate_fn)))
    assert [plain(part) for part in again] == [plain(part) for part in first]


def test_a_batch_that_is_not_of_our_order_is_fetched_as_it_is():
    loader = loader_of(Seen())
    assert loader.dataset.__getitems__([3, 1]) == [[3, 1], [1, 1]]
    assert plain(loader.collate_fn([[3, 1], [1, 1]])[0]) == [3, 1]


def test_workers_of_another_dataset_than_those_of_the_training_do_not_disturb_it():
    training, evaluation = loader_of(), loader_of(number=1)
    seen, cursor = [], training.batch_sampler
    cursor.begin(cursor.create(0))
    for batch in training:
        seen.append([plain(part) for part in batch])
        list(evaluation)
    assert seen == expected()[0]
