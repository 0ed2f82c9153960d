"""The resumable DataLoader: its order is its own, and its position is what the training has seen."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hpcckpt.data import Cursor, make_loader
from hpcckpt.errors import CheckpointMismatchError, UsageError


class Numbers(Dataset):
    """Sample i is i; with noise, so is what a worker draws for it."""

    def __init__(self, size, *, noisy=False):
        self.size, self.noisy = size, noisy

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return (index, torch.rand(()).item()) if self.noisy else index


DEFAULTS = {"batch_size": 4, "shuffle": True, "drop_last": False, "rank": 0, "world_size": 1, "seed": 7, "number": 0}


def loader_of(dataset=None, **changes):
    return make_loader(Numbers(41) if dataset is None else dataset, **{**DEFAULTS, **changes})


def trained(loader, epoch, batches=None):
    """Train on an epoch as `run.batches` does, to its end or for some batches; return what was seen."""
    cursor = loader.batch_sampler
    cursor.begin(epoch)
    seen = []
    for batch in itertools.islice(loader, batches):
        cursor.advance()
        seen.append([item.tolist() for item in batch] if isinstance(batch, list) else batch.tolist())
    return seen


def test_every_sample_comes_once_over_the_ranks_each_epoch():
    for epoch in range(3):
        counted = Counter()
        for rank in range(3):
            for batch in trained(loader_of(rank=rank, world_size=3), epoch):
                counted.update(batch)
        assert counted == Counter(range(41))


def test_without_shuffle_the_order_is_that_of_the_dataset():
    assert trained(loader_of(shuffle=False), 5) == [list(range(low, min(low + 4, 41))) for low in range(0, 41, 4)]


def test_a_dataset_that_does_not_fill_the_last_batch_drops_it_if_asked():
    assert [len(batch) for batch in trained(loader_of(drop_last=True), 0)] == [4] * 10
    assert [len(batch) for batch in trained(loader_of(), 0)] == [4] * 10 + [1]


CHANGES = {
    "seed": {"seed": 8},
    "number": {"number": 1},
    "epoch": {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_order_depends_on(change):
    changed = trained(loader_of(**CHANGES[change]), 3 if change != "epoch" else 4)
    assert changed != trained(loader_of(), 3)
    assert sorted(itertools.chain(*changed)) == list(range(41))


def test_the_order_depends_on_nothing_else():
    expected = list(itertools.chain(*trained(loader_of(), 3)))
    torch.manual_seed(99)
    used = loader_of()
    for epoch in (0, 3, 1):
        trained(used, epoch, batches=2)
    assert list(itertools.chain(*trained(used, 3))) == expected
    assert list(itertools.chain(*trained(loader_of(batch_size=7), 3))) == expected
    both = [trained(loader_of(rank=rank, world_size=2, batch_size=2), 3) for rank in range(2)]
    assert list(itertools.chain(*(batch for pair in zip(*both, strict=True) for part in pair for batch in [part]))) == expected


def test_the_order_is_the_same_for_ever():
    assert trained(loader_of(Numbers(8)), 0) == [[6, 5, 3, 0], [4, 2, 7, 1]]


def resumed(position, **changes):
    loader = loader_of(**changes)
    loader.batch_sampler.restore(position)
    return loader


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize("done", range(12))
def test_from_every_position_exactly_the_rest_follows(done, shuffle):
    whole = trained(loader_of(shuffle=shuffle), 3)
    loader = loader_of(shuffle=shuffle)
    assert trained(loader, 3, batches=done) == whole[:done]
    position = loader.batch_sampler.position()
    assert position == {"consumed": min(done * 4, 41), "num_samples": 41}
    again = resumed(position, shuffle=shuffle)
    again.batch_sampler.begin(3)
    assert again.batch_sampler.position() == position
    assert trained(resumed(position, shuffle=shuffle), 3) == whole[done:]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 5), max_size=3), st.booleans())
def test_interrupted_anywhere_and_on_any_world_size_every_sample_comes_once(size, world, other_world, batch_size, stops, shuffle):
    dataset = Numbers(max(size, world, other_world))
    counted, position = Counter(), {"consumed": 0, "num_samples": len(dataset)}
    for leg, stop in enumerate([*stops, None]):
        world_size = (world, other_world)[leg % 2]
        if stop is None and len(dataset) - position["consumed"] < world_size:
            world_size = 1
        shares, positions = [], set()
        for rank in range(world_size):
            loader = resumed(position, dataset=dataset, shuffle=shuffle, batch_size=batch_size, rank=rank, world_size=world_size)
            shares.append(trained(loader, 2, stop))
            positions.add(tuple(loader.batch_sampler.position().items()))
        assert len(positions) == 1
        drawn = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(shares)))
        # Fewer samples than ranks were left: some ranks saw the same ones.
        counted.update(set(drawn) if len(dataset) - position["consumed"] < world_size else drawn)
        position = dict(positions.pop())
    assert counted == Counter(range(len(dataset)))


def test_a_restored_position_holds_for_one_epoch():
    loader = resumed({"consumed": 40, "num_samples": 41})
    assert [len(trained(loader, epoch)) for epoch in (3, 4)] == [1, 11]


def test_the_position_begins_anew_with_each_epoch():
    loader = resumed({"consumed": 8, "num_samples": 41})
    positions = []
    for epoch, batches in ((3, 2), (4, 0), (5, 1), (6, None)):
        trained(loader, epoch, batches)
        positions.append(loader.batch_sampler.position()["consumed"])
    assert positions == [16, 0, 4, 41]


@pytest.mark.parametrize("consumed", [0, 4, 20, 41])
def test_the_length_is_that_of_a_whole_epoch_wherever_it_goes_on(consumed):
    loader = resumed({"consumed": consumed, "num_samples": 41})
    assert len(loader) == 11
    loader.batch_sampler.begin(3)
    assert len(loader) == 11
    assert len(loader_of(drop_last=True)) == 10
    assert len(loader_of(world_size=3)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_fetch_ahead_does_not_move_the_position(workers):
    whole = trained(loader_of(), 3)
    loader = loader_of(num_workers=workers, prefetch_factor=4 if workers else None)
    cursor = loader.batch_sampler
    cursor.begin(3)
    for done, batch in enumerate(loader, 1):
        cursor.advance()
        assert batch.tolist() == whole[done - 1]
        assert cursor.position()["consumed"] == min(done * 4, 41)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = loader_of(num_workers=workers)
    trained(loader, 0)
    trained(loader, 1, batches=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_draw_the_same_whatever_came_before_in_the_process():
    expected = trained(loader_of(Numbers(12, noisy=True), num_workers=2), 3)
    torch.manual_seed(99)
    used = loader_of(Numbers(12, noisy=True), num_workers=2)
    other_epoch = trained(used, 2)
    assert trained(used, 3) == expected
    assert {draw for _, draws in other_epoch for draw in draws}.isdisjoint(draw for _, draws in expected for draw in draws)


def test_it_is_a_plain_dataloader_with_its_other_arguments():
    loader = loader_of(TensorDataset(torch.arange(8.0)), collate_fn=len)
    assert type(loader) is DataLoader
    assert isinstance(loader.batch_sampler, Cursor)
    assert list(loader) == [4, 4]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class StreamWithLength(Stream):
    def __len__(self):
        return 3


class Endless(Dataset):
    def __getitem__(self, index):
        return index


REFUSED = {
    "stream": ({"dataset": Stream()}, "the dataset has no length"),
    "stream with a length": ({"dataset": StreamWithLength()}, "the dataset has no length"),
    "no length": ({"dataset": Endless()}, "the dataset has no length"),
    "sampler": ({"sampler": [1, 2]}, r"sampler=… would replace the resumable order"),
    "batch sampler": ({"batch_sampler": None}, r"batch_sampler=… would replace the resumable order"),
    "generator": ({"generator": torch.Generator()}, r"generator=… would replace the resumable order"),
    "no batch": ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
    "fewer samples than ranks": ({"dataset": Numbers(3), "world_size": 4}, "3 samples are too few for 4 ranks; ask for fewer tasks"),
    "nothing": ({"dataset": Numbers(0)}, "0 samples are too few for 1 ranks"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_resumed_is_refused(changes, message):
    with pytest.raises(UsageError, match=r"^run\.loader: .*" + message):
        loader_of(**changes)


def test_a_dataset_of_another_size_does_not_fit_the_position():
    loader = loader_of(number=2)
    with pytest.raises(CheckpointMismatchError, match="the dataset of loader 2 has 41 samples, but had 40 when"):
        loader.batch_sampler.restore({"consumed": 4, "num_samples": 40})
    assert len(trained(loader, 0)) == 11
