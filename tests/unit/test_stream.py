"""Iterable datasets: they say themselves where they are, and go on there, with and without workers."""

import io
import itertools
import random
import sys

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hpcckpt.data import STATES, Loops, Share, make_loader
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.state.portable import portable
from hpcckpt.state.rng import rng_state, seed_all, set_rng_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
    # torchdata 0.11 on newer versions of torch
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]
SIZE = 22
WORKERS = [0, 1, 3]


class Stream(IterableDataset):
    """Every worker's share of the numbers, in order; with draws, shuffled through a small buffer."""

    def __init__(self, *, draws=False, size=SIZE, step=1):
        self.draws, self.size, self.step = draws, size, step
        self.epoch = 0
        self.state = self.loaded = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):  # begins anew, unless a state was loaded since
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.state, self.loaded = self.loaded or {"next": first, "buffer": torch.empty(0, dtype=torch.int64)}, None
        while True:
            buffer, following = self.state["buffer"].tolist(), self.state["next"]
            while following < self.size and len(buffer) < (4 if self.draws else 1):
                buffer.append(following + 1000 * self.epoch)
                following += stride
            if not buffer:
                return
            chosen = buffer.pop(random.randrange(len(buffer)) if self.draws else 0)
            self.state = {"next": following, "buffer": torch.tensor(buffer, dtype=torch.int64)}
            yield (chosen, torch.rand(()).item()) if self.draws else chosen

    def state_dict(self):
        return {"next": self.state["next"], "buffer": self.state["buffer"]}  # fails before the first sample, as a user's may

    def load_state_dict(self, state):
        self.loaded = state


class Batches(Stream):
    """Gives batches of its own."""

    def __iter__(self):
        for first in super().__iter__():
            yield torch.tensor([first, -first])


class One:
    """A run with one loader, as far as the data goes."""

    def __init__(self, dataset=None, *, rank=0, world_size=1, **arguments):
        self.loops = Loops()
        self.loader, self.place, size = make_loader(
            Stream(draws=True) if dataset is None else dataset, Share(rank, world_size, 7, 0), **{"batch_size": 3, **arguments}
        )
        self.loops.add(self.loader, self.place, size)

    def train(self, epoch, batches=None):
        """Train as `run.batches` and `run.step` do, up to a stop in a step, or to the end."""
        self.loops.begin(*self.loops.create(self.loader, epoch), epoch)
        seen = []
        if not self.place.is_skipped:
            for batch in itertools.islice(self.loader, batches):
                self.place.advance()
                seen.append([part.tolist() for part in batch] if isinstance(batch, list) else torch.as_tensor(batch).tolist())
                self.loops.step()
        if batches is None:
            self.loops.end(self.place, is_exhausted=True)
        return seen

    def leave_loop(self):
        self.loops.end(self.place, is_exhausted=False)

    def checkpoint(self, epoch, others=()):
        """Return what a checkpoint has, as it is read again."""
        data = self.loops.data_state(epoch)
        streams = portable(self.loops.streams(epoch), "streams")
        if streams:
            data["loaders"]["0"][STATES] = [streams["0"], *(portable(other.loops.streams(epoch), "streams")["0"] for other in others)]
        file = io.BytesIO()
        torch.save({"data": data, "rng": rng_state()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def restore(self, epoch, checkpoint):
        self.loops.restore(epoch, checkpoint["data"]["loaders"], checkpoint["data"]["last_loader"], 0)
        set_rng_state(checkpoint["rng"])
        return self


@pytest.fixture(autouse=True)
def _seeded():
    seed_all(3)


KINDS = {
    "in order": (Stream, {}),
    "shuffled": (lambda: Stream(draws=True), {}),
    "drop_last": (Stream, {"drop_last": True}),
    "batches of its own": (Batches, {"batch_size": None}),
    "single samples": (Stream, {"batch_size": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", WORKERS)
def test_resumed_at_any_position_exactly_the_rest_follows(kind, workers):
    make, arguments = KINDS[kind]
    arguments = {**arguments, "num_workers": workers}
    first = One(make(), **arguments)
    whole = [first.train(epoch) for epoch in (1, 2)]
    places = range(1, len(whole[0]) + 1)
    for done in places if not workers else (1, 2, len(places) - 1, len(places)):
        seed_all(3)
        begun = One(make(), **arguments)
        seen = begun.train(1, done)
        checkpoint = begun.checkpoint(1)
        seed_all(99)
        resumed = One(make(), **arguments).restore(1, checkpoint)
        assert seen + resumed.train(1) == whole[0], f"resumed behind batch {done}"
        if done in (1, len(places)):
            resumed.loops.end_epoch()
            assert resumed.train(2) == whole[1]


@pytest.mark.parametrize("workers", WORKERS)
def test_every_number_comes_once_an_epoch_and_the_epochs_differ(workers):
    run = One(num_workers=workers)
    epochs = [run.train(epoch) for epoch in (0, 1)]
    for epoch, batches in enumerate(epochs):
        assert sorted(number for numbers, _ in batches for number in numbers) == [1000 * epoch + i for i in range(SIZE)]
    draws = [draw for batches in epochs for _, drawn in batches for draw in drawn]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("workers", WORKERS)
def test_interrupted_again_and_again(workers):
    whole = One(num_workers=workers).train(1)
    seed_all(3)
    run, seen = One(num_workers=workers), []
    for _ in whole:
        seen += run.train(1, 1)
        run = One(num_workers=workers).restore(1, run.checkpoint(1))
    assert seen == whole
    assert run.train(1) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_a_state_that_was_restored_stays_until_the_next_step(workers):
    run = One(num_workers=workers)
    run.train(1, 2)
    checkpoint = run.checkpoint(1)
    again = One(num_workers=workers).restore(1, checkpoint)
    assert again.checkpoint(1)["data"]["loaders"].keys() == {"0"}
    again.loops.begin(*again.loops.create(again.loader, 1), 1)
    next(iter(again.loader))
    again.place.advance()
    expected = One(num_workers=workers).restore(1, checkpoint).train(1)
    assert One(num_workers=workers).restore(1, again.checkpoint(1)).train(1) == expected or not workers  # without, generators went on


@pytest.mark.parametrize("workers", WORKERS)
def test_behind_a_break_the_next_epoch_begins_at_its_beginning(workers):
    run = One(Stream(), num_workers=workers)
    run.train(0, 2)
    run.leave_loop()
    data = run.checkpoint(0)
    run.loops.end_epoch()
    assert run.train(1) == One(Stream(), num_workers=workers).train(1)
    resumed = One(Stream(), num_workers=workers).restore(0, data)
    assert resumed.train(0) == []  # the break is not undone
    assert len(resumed.train(1)) == 8 + (workers == 3)


@pytest.mark.parametrize("workers", WORKERS)
def test_left_behind_a_break_with_nothing_after_it_the_rest_follows(workers):
    whole = One(num_workers=workers).train(0)
    seed_all(3)
    run = One(num_workers=workers)
    run.train(0, 2)
    run.leave_loop()
    run.loops.go_back()
    assert One(num_workers=workers).restore(0, run.checkpoint(0)).train(0) == whole[2:]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_second_loop_in_an_epoch_begins_at_its_beginning_and_is_gone_on_with(workers):
    whole = [One(Stream(), num_workers=workers).train(0)] * 2
    run = One(Stream(), num_workers=workers)
    assert [run.train(0), run.train(0, 3)] == [whole[0], whole[1][:3]]
    resumed = One(Stream(), num_workers=workers).restore(0, run.checkpoint(0))
    assert [resumed.train(0), resumed.train(0)] == [[], whole[1][3:]]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_workers_draw_depends_on_the_rank_the_epoch_and_nothing_in_this_process(workers):
    expected = One(num_workers=workers).train(1)
    seed_all(99)
    before = torch.get_rng_state()
    assert One(num_workers=workers).train(1) == expected
    assert torch.equal(torch.get_rng_state(), before)
    other = One(num_workers=workers, rank=1, world_size=2).train(1)
    assert {draw for _, draws in other for draw in draws}.isdisjoint(draw for _, draws in expected for draw in draws)


def test_without_workers_the_trainings_generators_are_drawn_from():
    state, run = random.getstate(), One()
    run.train(0)
    assert random.getstate() != state
    random.setstate(state)
    expected = random.getstate()
    One(Stream()).train(0)
    assert random.getstate() == expected


def test_each_rank_gets_back_its_own_state():
    ranks = [One(rank=rank, world_size=2) for rank in range(2)]
    ranks[0].train(1, 2)
    ranks[1].train(1, 2)
    checkpoint = ranks[0].checkpoint(1, ranks[1:])
    states = checkpoint["data"]["loaders"]["0"][STATES]
    assert states[0]["dataset"]["buffer"].tolist() != states[1]["dataset"]["buffer"].tolist()
    for rank in range(2):
        resumed = One(rank=rank, world_size=2).restore(1, checkpoint)
        assert resumed.loops.streams(1)["0"]["dataset"]["buffer"].tolist() == states[rank]["dataset"]["buffer"].tolist()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"num_workers": 1}, "fits 1 ranks with num_workers=0 only, not 1 with 1"),
        ({"world_size": 2}, "fits 1 ranks with num_workers=0 only, not 2 with 0"),
    ],
    ids=["workers", "ranks"],
)
def test_within_an_epoch_it_goes_on_only_with_as_many(now, message):
    run = One(Stream())
    run.train(1, 2)
    checkpoint = run.checkpoint(1)
    with pytest.raises(CheckpointMismatchError, match=f"loader 0 has an iterable dataset, whose place within an epoch {message}: go on as"):
        One(Stream(), **now).restore(1, checkpoint)


@pytest.mark.parametrize("now", [{"num_workers": 1}, {"world_size": 2}], ids=["workers", "ranks"])
def test_between_epochs_and_behind_its_loop_it_goes_on_with_any(now):
    run = One(Stream())
    run.train(1)
    within = run.checkpoint(1)
    resumed = One(Stream(), **now).restore(1, within)
    assert resumed.train(1) == []
    resumed.loops.end_epoch()
    assert resumed.loops.data_state(2)["loaders"] == {}
    assert sum(map(len, resumed.train(2))) == SIZE


def test_a_position_of_a_dataset_with_a_length_does_not_fit():
    position = {"consumed": 4, "num_samples": SIZE}
    with pytest.raises(CheckpointMismatchError, match="loader 0 has an iterable dataset, but had one with a length when the epoch"):
        One(Stream()).restore(1, {"data": {"loaders": {"0": position}, "last_loader": "0"}, "rng": rng_state()})


class SeededItself(Stream):
    """Has attributes that a loader might use, too."""

    def __init__(self):
        super().__init__()
        self.seed = self.count = 5
        self.dataset = "mine"


def test_attributes_are_those_of_the_dataset():
    run = One(SeededItself())
    dataset = run.loader.dataset
    assert (dataset.seed, dataset.count, dataset.dataset, len(dataset)) == (5, 5, "mine", SIZE)
    dataset.seed = 6
    assert dataset.seed == 6
    assert run.train(0) == One(Stream()).train(0)
    assert dataset.seed == 6


def test_its_length_is_that_of_the_dataset_if_it_has_one():
    class Endless(Stream):
        __len__ = None

    assert len(One(Stream()).loader) == 8
    assert len(One(Stream(), num_workers=1).loader) == 8
    with pytest.raises(TypeError):
        len(One(Endless()).loader)
    assert len(One(Endless()).train(0)) == 8


class NoState(IterableDataset):
    def __iter__(self):
        return iter(range(3))


REFUSED = {
    "no state": ({"dataset": NoState()}, "a NoState has no length and no state, so its order cannot be resumed"),
    "shuffle": ({"shuffle": True}, "an iterable dataset gives its own order: leave shuffle, sampler and batch_sampler out"),
    "sampler": ({"sampler": [1]}, "an iterable dataset gives its own order"),
    "batch sampler": ({"batch_sampler": [[1]]}, "an iterable dataset gives its own order"),
    "workers that stay": ({"num_workers": 1, "persistent_workers": True}, "persistent_workers would keep the first epoch's state"),
    "generator": ({"generator": torch.Generator()}, "generator=… would replace the resumable order"),
    "no batch": ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_resumed_is_refused(arguments, message):
    with pytest.raises(UsageError, match=rf"^run\.loader: {message}"):
        One(**arguments)


def test_workers_without_torchdata_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(UsageError, match=r"workers of an iterable dataset need torchdata's StatefulDataLoader.*: pip install torchdata"):
        One(num_workers=1)
    assert sum(map(len, One(Stream()).train(0))) == SIZE
