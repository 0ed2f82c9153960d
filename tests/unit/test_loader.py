"""The resumable DataLoader: its order is its own, and its position is what steps were made with."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from hpcckpt.data import Share, make_loader
from hpcckpt.data.cursor import Cursor
from hpcckpt.errors import CheckpointMismatchError, UsageError


class Numbers(Dataset):
    """Sample i is i; with noise, so is what a worker draws for it."""

    def __init__(self, size, *, noisy=False):
        self.size, self.noisy = size, noisy

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return (index, torch.rand(()).item()) if self.noisy else index


def loader_of(dataset=None, *, rank=0, world_size=1, seed=7, number=0, **arguments):
    share = Share(rank, world_size, seed, number)
    return make_loader(Numbers(41) if dataset is None else dataset, share, **{"batch_size": 4, "shuffle": True, **arguments})[0]


def trained(loader, epoch, batches=None):
    """Train on an epoch as `run.batches` and `run.step` do, up to a stop behind some or all batches; return what was seen."""
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(epoch))
    seen = []
    for batch in itertools.islice(loader, batches):
        cursor.advance()
        cursor.step()
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


@pytest.mark.parametrize("size", [np.int64(4), np.uint8(4), torch.tensor(4)], ids=lambda size: str(type(size)))
def test_a_batch_size_may_be_a_whole_number_of_any_kind(tmp_path, size):
    loader, _, asked = make_loader(Numbers(41), Share(0, 1, 7, 0), batch_size=size, shuffle=True)
    assert trained(loader, 3) == trained(loader_of(), 3)
    torch.save(asked.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state, {type(value) for value in state.values()}) == ({"asked": 4, "together": 4}, {int})


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


def resumed(position, epoch=3, **changes):
    loader = loader_of(**changes)
    loader.batch_sampler.restore(epoch, position)
    return loader


def position_of(cursor, epoch):
    """Return a position as far as it is this loader's alone."""
    position = cursor.position(epoch)
    return None if position is None else {key: value for key, value in position.items() if key not in ("batches", "is_over")}


def at(consumed):
    return {"consumed": consumed, "num_samples": 41, "loop": 0, "trained_loops": []}


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize("done", range(1, 12))
def test_from_every_position_exactly_the_rest_follows(done, shuffle):
    whole = trained(loader_of(shuffle=shuffle), 3)
    loader = loader_of(shuffle=shuffle)
    assert trained(loader, 3, batches=done) == whole[:done]
    position = position_of(loader.batch_sampler, 3)
    assert position == at(min(done * 4, 41))
    again = resumed(position, shuffle=shuffle)
    again.batch_sampler.begin(again.batch_sampler.create(3))
    assert position_of(again.batch_sampler, 3) == position
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
            loader = resumed(position, 2, dataset=dataset, shuffle=shuffle, batch_size=batch_size, rank=rank, world_size=world_size)
            shares.append(trained(loader, 2, stop))
            positions.add((position_of(loader.batch_sampler, 2)["consumed"], len(dataset)))
        assert len(positions) == 1
        drawn = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(shares)))
        # Fewer samples than ranks were left: some ranks saw the same ones.
        counted.update(set(drawn) if len(dataset) - position["consumed"] < world_size else drawn)
        position = dict(zip(("consumed", "num_samples"), positions.pop(), strict=True))
    assert counted == Counter(range(len(dataset)))


def test_a_restored_position_holds_for_one_epoch():
    loader = resumed(at(40))
    assert [len(trained(loader, epoch)) for epoch in (3, 4)] == [1, 11]


def test_the_position_begins_anew_with_each_epoch():
    loader = resumed(at(8))
    positions = []
    for epoch, batches in ((3, 2), (4, 0), (5, 1), (6, None)):
        trained(loader, epoch, batches)
        positions.append(position_of(loader.batch_sampler, epoch))
    assert positions == [at(16), None, at(4), at(41)]


def test_the_position_of_another_epoch_is_none():
    loader = loader_of()
    cursor = loader.batch_sampler
    trained(loader, 3, batches=2)
    assert [position_of(cursor, epoch) for epoch in (2, 3, 4)] == [None, at(8), None]
    cursor.end()
    assert [position_of(cursor, epoch) for epoch in (2, 3, 4)] == [None, at(41), None]
    cursor.begin(cursor.create(4))
    assert position_of(cursor, 4) is None
    restored = resumed(at(8)).batch_sampler
    assert [position_of(restored, epoch) for epoch in (2, 3, 4)] == [None, at(8), None]


def test_a_loader_that_was_restored_but_not_begun_keeps_its_position():
    loader = resumed(at(8))
    cursor = loader.batch_sampler
    other = loader_of(number=1)
    trained(other, 3, batches=1)
    assert (position_of(cursor, 3), cursor.in_progress, cursor.trains) == (at(8), False, True)
    assert trained(resumed(position_of(cursor, 3)), 3) == trained(loader_of(), 3)[2:]


def test_a_loader_that_was_restored_and_begun_without_a_step_keeps_its_position():
    loader = resumed(at(8))
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(3))
    next(iter(loader))
    cursor.advance()
    assert position_of(cursor, 3) == at(8)
    cursor.end(is_exhausted=False)
    assert position_of(cursor, 3) == at(41)  # it was left by a break
    cursor.go_back()
    assert position_of(cursor, 3) == at(8)


def test_a_loader_that_was_restored_and_run_to_its_end_without_a_step_is_over():
    loader = resumed(at(8))
    assert len(evaluated(loader, 3)) == 9
    assert position_of(loader.batch_sampler, 3) == at(41)


def test_a_batch_in_progress_is_not_counted():
    loader = loader_of()
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(3))
    batches = iter(loader)
    seen = []
    for expected in (None, at(4), at(8)):
        next(batches)
        cursor.advance()
        seen.append(cursor.in_progress)
        assert position_of(cursor, 3) == expected
        cursor.step()
        seen.append(cursor.in_progress)
    assert seen == [True, False] * 3
    assert position_of(cursor, 3) == at(12)


def test_a_step_counts_all_batches_since_the_one_before():
    loader = loader_of()
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(3))
    for number, _ in enumerate(loader, 1):
        cursor.advance()
        if number % 3 == 0:  # gradient accumulation
            cursor.step()
        assert position_of(cursor, 3) == (at(number // 3 * 12) if number >= 3 else None)
        assert cursor.in_progress is (number % 3 != 0)


def evaluated(loader, epoch, batches=None, ended=True):
    """Loop over an epoch without a step; return what was seen."""
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(epoch))
    seen = []
    for batch in itertools.islice(loader, batches):
        cursor.advance()
        seen.append(batch.tolist())
    if ended:
        cursor.end()
    return seen


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "stopped within"])
@pytest.mark.parametrize("batches", [0, 1, 5, None])
def test_a_loop_without_steps_has_no_position_and_always_begins_anew(batches, ended):
    whole = trained(loader_of(number=1), 3)
    loader = loader_of(number=1)
    cursor = loader.batch_sampler
    for _ in range(3):
        assert evaluated(loader, 3, batches, ended) == whole[:batches]
        assert (position_of(cursor, 3), cursor.trains) == (None, False)
        assert cursor.in_progress is (not ended and batches != 0)
    assert evaluated(loader, 3) == whole


def test_a_loop_without_steps_within_a_training_loop_disturbs_neither():
    whole = trained(loader_of(), 3)
    training, evaluation = loader_of(), loader_of(number=1)
    ours, other = training.batch_sampler, evaluation.batch_sampler
    ours.begin(ours.create(3))
    seen = []
    for done, batch in enumerate(training, 1):
        ours.advance()
        ours.step()
        seen.append(batch.tolist())
        evaluated(evaluation, 3, batches=done % 4)
        assert (position_of(ours, 3), position_of(other, 3)) == (at(min(done * 4, 41)), None)
        assert not ours.in_progress
    assert seen == whole
    assert (ours.trains, other.trains) == (True, False)


def test_a_loop_without_steps_over_the_training_loader_itself_leaves_its_position():
    loader = loader_of()
    cursor = loader.batch_sampler
    whole = trained(loader, 3)
    cursor.end()
    assert evaluated(loader, 3, batches=2) == whole[:2]
    assert position_of(cursor, 3) == at(41)
    again = resumed(at(41))
    assert trained(again, 3) == []
    again.batch_sampler.end()
    assert position_of(again.batch_sampler, 3) == at(41)
    assert evaluated(again, 3) == whole


@pytest.mark.parametrize("drop_last", [False, True], ids=["all", "drop_last"])
@pytest.mark.parametrize("batches", [1, 4, None], ids=["break at once", "break", "to the end"])
def test_of_a_loop_with_steps_that_is_over_nothing_is_left(batches, drop_last):
    loader = loader_of(drop_last=drop_last)
    trained(loader, 3, batches)
    loader.batch_sampler.end()
    assert position_of(loader.batch_sampler, 3) == at(41)
    assert not loader.batch_sampler.in_progress
    again = resumed(at(41), drop_last=drop_last)
    assert trained(again, 3) == []
    assert len(trained(again, 4)) == (10 if drop_last else 11)


def test_of_a_loop_that_was_left_within_a_batch_behind_a_step_nothing_is_left():
    loader = loader_of()
    cursor = loader.batch_sampler
    trained(loader, 3, batches=2)
    cursor.advance()
    assert cursor.in_progress
    cursor.end()
    assert (position_of(cursor, 3), cursor.in_progress) == (at(41), False)


def test_a_loader_is_known_to_train_from_its_first_step_on():
    loader = loader_of()
    cursor = loader.batch_sampler
    assert not cursor.trains
    evaluated(loader, 0)
    assert not cursor.trains
    trained(loader, 1, batches=1)
    assert cursor.trains
    cursor.end()
    evaluated(loader, 2)
    assert cursor.trains


@pytest.mark.parametrize("consumed", [0, 4, 20, 41])
def test_the_length_is_that_of_a_whole_epoch_wherever_it_goes_on(consumed):
    loader = resumed(at(consumed))
    assert len(loader) == 11
    loader.batch_sampler.begin(loader.batch_sampler.create(3))
    assert len(loader) == 11
    assert len(loader_of(drop_last=True)) == 10
    assert len(loader_of(world_size=3)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_fetch_ahead_does_not_move_the_position(workers):
    whole = trained(loader_of(), 3)
    loader = loader_of(num_workers=workers, prefetch_factor=4 if workers else None)
    cursor = loader.batch_sampler
    cursor.begin(cursor.create(3))
    for done, batch in enumerate(loader, 1):
        assert position_of(cursor, 3) == (at((done - 1) * 4) if done > 1 else None)
        cursor.advance()
        cursor.step()
        assert batch.tolist() == whole[done - 1]
        assert position_of(cursor, 3) == at(min(done * 4, 41))


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
    "stream": ({"dataset": Stream(), "shuffle": False}, "a Stream has no length and no state"),
    "stream with a length": ({"dataset": StreamWithLength(), "shuffle": False}, "a StreamWithLength has no length and no state"),
    "shuffled stream": ({"dataset": Stream()}, "an iterable dataset gives its own order: leave shuffle, sampler and batch_sampler out"),
    "no length": ({"dataset": Endless()}, "the dataset has no length"),
    "shuffle and sampler": ({"sampler": [1, 2]}, "sampler gives the order: leave shuffle out"),
    "batch size and batch sampler": ({"batch_sampler": [[1, 2]]}, "batch_sampler makes the batches: leave batch_size, shuffle, sampler"),
    "share of a sampler": (
        {"sampler": DistributedSampler(Numbers(41), num_replicas=2, rank=0), "shuffle": False},
        "a DistributedSampler gives this rank's share already",
    ),
    "endless sampler": ({"sampler": iter([1]), "shuffle": False}, "sampler: a list_iterator has no length"),
    "out of order": ({"in_order": False}, "in_order=False would hand batches over in an order that cannot be repeated"),
    "generator": ({"generator": torch.Generator()}, r"generator=… would replace the resumable order"),
    "no batch": ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
    "less than no batch": ({"batch_size": -1}, "batch_size=-1 must be a whole number, at least 1"),
    "no whole batch": ({"batch_size": 2.5}, r"batch_size=2\.5 must be a .*number"),
    "a whole number of another kind": ({"batch_size": np.float64(4)}, r"batch_size=.*4\.0.* must be a .*number"),
    "a size in words": ({"batch_size": "4"}, "batch_size='4' must be a .*number"),
    "several sizes": ({"batch_size": [4]}, r"batch_size=\[4\] must be a .*number"),
    "no automatic batches": ({"batch_size": None}, "batch_size=None must be a whole number, at least 1"),
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
        loader.batch_sampler.restore(0, {"consumed": 4, "num_samples": 40})
    assert (position_of(loader.batch_sampler, 0), loader.batch_sampler.trains) == (None, False)
    assert len(trained(loader, 0)) == 11


def test_a_restored_position_is_of_its_epoch_only_also_where_that_epoch_does_not_use_the_loader():
    cursor = loader_of(TensorDataset(torch.arange(8)), batch_size=2, shuffle=False).batch_sampler
    cursor.restore(3, {"consumed": 6, "num_samples": 8})
    cursor.begin(cursor.create(4))
    assert [index for batch in cursor for index in batch] == list(range(8))


@pytest.mark.parametrize("done", range(1, 11))
def test_batches_are_numbered_on_behind_an_interruption(done):
    loader = loader_of()
    trained(loader, 3, batches=done)
    again = loader_of()
    again.batch_sampler.restore(3, loader.batch_sampler.position(3))
    again.batch_sampler.begin(again.batch_sampler.create(3))
    numbers = []
    for _ in again:
        again.batch_sampler.advance()
        numbers.append(again.batch_sampler.batch)
    assert numbers == list(range(done, 11))
    again.batch_sampler.begin(again.batch_sampler.create(4))
    again.batch_sampler.advance()
    assert again.batch_sampler.batch == 0
