"""The order of an epoch: from samplers of every kind, the same on every rank and attempt, each sample once over all of them."""

import itertools
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hpcckpt.data import Share, make_loader
from hpcckpt.data.order import of_batch_sampler, of_sampler
from hpcckpt.errors import CheckpointMismatchError, UsageError

SIZE = 23


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, size=SIZE):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class OfLength(Sampler):
    """Says that it has so many units, and gives what it is given."""

    def __init__(self, give, length=SIZE):
        self.give, self.length = give, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.give())


class OfEpoch(OfLength):
    """Draws from its epoch, as DistributedSampler does; notes which epochs it was told."""

    def __init__(self, length=SIZE):
        self.length, self.told = length, []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.told[-1])).tolist())


class Buckets(Sampler):
    """Batches of 1 to 4 samples of one bucket; how many there are varies from epoch to epoch, its length says the most."""

    def __len__(self):
        return SIZE

    def __iter__(self):
        left = torch.randperm(SIZE).tolist()
        batches = []
        while left:
            size = random.randint(1, 4)
            batches.append(left[:size])
            del left[:size]
        random.shuffle(batches)
        yield from batches


SAMPLERS = {
    "random": lambda: RandomSampler(range(SIZE)),
    "random with a generator of its own": lambda: RandomSampler(range(SIZE), generator=torch.Generator()),
    "subset": lambda: SubsetRandomSampler(range(SIZE)),
    "set_epoch": OfEpoch,
    "global torch": lambda: OfLength(lambda: torch.randperm(SIZE).tolist()),
    "global numpy": lambda: OfLength(lambda: np.random.permutation(SIZE)),  # noqa: NPY002 - what users write
    "global random": lambda: OfLength(lambda: random.sample(range(SIZE), SIZE)),
    "tensor": lambda: OfLength(lambda: torch.randperm(SIZE)),
    "drawn one by one": lambda: OfLength(lambda: sorted(range(SIZE), key=lambda _: random.random())),
}
WEIGHTED = {"weighted": lambda: WeightedRandomSampler(torch.arange(SIZE) + 1.0, SIZE, replacement=True)}
BATCHES = {
    **{f"batches of {name}": lambda make=make: BatchSampler(make(), 3, drop_last=False) for name, make in (SAMPLERS | WEIGHTED).items()},
    "buckets": Buckets,
    "arrays": lambda: OfLength(lambda: np.random.permutation(SIZE - 2).reshape(-1, 3), 7),  # noqa: NPY002
    "typed arrays": lambda: OfLength(lambda: [np.array([1, 2], dtype="int32"), memoryview(bytes([3, 4]))], 2),
}
EVERY = {**SAMPLERS, **WEIGHTED, **BATCHES}


def kind(name):
    return "batch_sampler" if name in BATCHES else "sampler"


def loader_of(name, *, rank=0, world_size=1, seed=7, number=0, **arguments):
    size = {} if name in BATCHES else {"batch_size": 2}
    return make_loader(Numbers(), Share(rank, world_size, seed, number), **{kind(name): EVERY[name](), **size, **arguments})[0]


def trained(loader, epoch, batches=None, position=None):
    """Train as `run.batches` and `run.step` do; return the batches, and the position behind them."""
    cursor = loader.batch_sampler
    if position is not None:
        cursor.restore(epoch, position)
    cursor.begin(cursor.create(epoch))
    seen = []
    for batch in itertools.islice(loader, batches):
        cursor.advance()
        cursor.step()
        seen.append(batch.tolist())
    return seen, cursor.position(epoch)


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("name", EVERY)
def test_an_attempt_that_begins_elsewhere_gets_the_order_of_the_one_before(name):
    expected = [trained(loader_of(name), epoch)[0] for epoch in (3, 4)]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    used = loader_of(name)
    for epoch in (0, 4, 1):
        trained(used, epoch, batches=2)
    assert [trained(used, epoch)[0] for epoch in (3, 4)] == expected


@pytest.mark.parametrize("name", [name for name in EVERY if name != "typed arrays"])
def test_the_order_varies_with_the_epoch(name):
    loader = loader_of(name)
    assert trained(loader, 3)[0] != trained(loader, 4)[0]


@pytest.mark.parametrize("change", [{"seed": 8}, {"number": 1}], ids=str)
@pytest.mark.parametrize("name", ["random", "random with a generator of its own", "weighted", "global numpy", "buckets"])
def test_what_is_drawn_varies_with(name, change):
    assert trained(loader_of(name, **change), 3)[0] != trained(loader_of(name), 3)[0]


@pytest.mark.parametrize("name", EVERY)
def test_the_global_generators_are_left_alone(name):
    before = generators()
    trained(loader_of(name), 0)
    assert generators() == before


def test_the_global_generators_are_left_alone_by_a_sampler_that_fails():
    def failing():
        yield random.randrange(3)
        raise OSError("the index is gone")

    for sampler in (OfLength(failing), OfLength(lambda: iter([random.random()]))):
        loader, before = make_loader(Numbers(), Share(0, 1, 7, 0), sampler=sampler)[0], generators()
        with pytest.raises((OSError, UsageError)):
            loader.batch_sampler.begin(loader.batch_sampler.create(0))
        assert generators() == before


@pytest.mark.parametrize("name", [*SAMPLERS, *(f"batches of {name}" for name in SAMPLERS), "buckets"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_comes_once_over_the_ranks(name, world_size):
    shares = [trained(loader_of(name, rank=rank, world_size=world_size), 3) for rank in range(world_size)]
    assert len({len(batches) for batches, _ in shares}) == 1, "a rank would wait for another one"
    assert len({str(position) for _, position in shares}) == 1
    assert Counter(index for batches, _ in shares for batch in batches for index in batch) == Counter(range(SIZE))


def test_all_that_a_sampler_with_replacement_gives_comes_over_the_ranks():
    (whole, _), *shares = [trained(loader_of("weighted", rank=rank, world_size=world), 3) for rank, world in ((0, 1), (0, 2), (1, 2))]
    counted = [Counter(itertools.chain(*batches)) for batches, _ in shares]
    assert counted[0] + counted[1] == Counter(itertools.chain(*whole))
    assert max((counted[0] + counted[1]).values()) > 1


@pytest.mark.parametrize("name", EVERY)
def test_from_every_position_exactly_the_rest_follows(name):
    whole, _ = trained(loader_of(name), 3)
    for done in range(1, len(whole) + 1):
        begun, position = trained(loader_of(name), 3, done)
        assert begun + trained(loader_of(name), 3, position=position)[0] == whole


@given(st.sampled_from([*SAMPLERS, "buckets", "batches of random"]), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=4))
def test_interrupted_anywhere_and_on_any_world_size_every_sample_comes_once(name, legs):
    counted, position = Counter(), None
    for world_size, stop in [*legs, (1, None)]:
        left = SIZE if position is None else position["num_samples"] - position["consumed"]
        ranks = world_size if left >= world_size else 1
        shares = [trained(loader_of(name, rank=rank, world_size=ranks), 3, stop, position) for rank in range(ranks)]
        assert len({str(there) for _, there in shares}) == 1
        position = shares[0][1]
        counted.update(index for batches, _ in shares for batch in batches for index in batch)
    assert counted == Counter(range(SIZE))


def test_a_bucketing_sampler_gives_its_own_batches_in_its_own_order():
    batches, _ = trained(loader_of("buckets"), 3)
    assert len({len(batch) for batch in batches}) > 2
    halves = [trained(loader_of("buckets", rank=rank, world_size=2), 3)[0] for rank in range(2)]
    pairs = len(batches) // 2 * 2 - 2  # the last ones may be put together, if they are odd
    assert [batch for pair in zip(*halves, strict=True) for batch in pair][:pairs] == batches[:pairs]


def test_the_number_of_batches_may_vary_from_epoch_to_epoch_and_from_what_was_said():
    loader = loader_of("buckets")
    lengths = [len(trained(loader, epoch)[0]) for epoch in range(6)]
    assert len(set(lengths)) > 1
    assert max(lengths) < SIZE


def test_a_sampler_is_told_its_epoch_wherever_it_is_hidden():
    inner = OfEpoch()
    loader = make_loader(Numbers(), Share(0, 1, 7, 0), batch_sampler=BatchSampler(inner, 4, drop_last=False))[0]
    trained(loader, 3)
    list(loader)  # without `run.batches`, before or behind
    assert set(inner.told) == {3}
    fresh = OfEpoch()
    list(make_loader(Numbers(), Share(0, 1, 7, 0), sampler=fresh)[0])
    assert fresh.told == [0]


def test_a_rank_that_gets_nothing_of_what_is_left_sees_what_another_one_does():
    position = {"consumed": SIZE - 1, "num_samples": SIZE}
    shares = [trained(loader_of("random", rank=rank, world_size=3), 3, position=position)[0] for rank in range(3)]
    assert shares == [shares[0]] * 3
    assert len(shares[0]) == 1


@pytest.mark.parametrize("name", ["random", "buckets"])
def test_behind_a_resumed_epoch_a_plain_loop_gives_all_of_it(name):
    whole, _ = trained(loader_of(name), 3)
    loader = loader_of(name)
    trained(loader, 3, position=trained(loader_of(name), 3, 5)[1])
    loader.batch_sampler.end()
    assert [batch.tolist() for batch in loader] == whole


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_listed_order_takes_eight_bytes_a_sample_and_eight_a_batch():
    count = 100_000
    # A growing array is moved with an eighth to spare; the list of an index each would take 36 bytes.
    assert peak_of(lambda: of_sampler(OfLength(lambda: range(count), count)).of(0, 0)) < 20 * count
    batches = OfLength(lambda: (range(low, low + 10) for low in range(0, count, 10)), count // 10)
    assert peak_of(lambda: of_batch_sampler(batches).of(0, 0)) < 22 * count
    order = of_sampler(SequentialSampler(range(count))).of(0, 0)
    assert order.indices.nbytes == 8 * count
    order = of_batch_sampler(batches).of(0, 0)
    assert (order.indices.nbytes, order.offsets.nbytes) == (8 * count, 8 * (count // 10 + 1))


class OwnShare(DistributedSampler):
    pass


class Around(Sampler):
    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        return iter(self.sampler)


def share_of(cls=DistributedSampler):
    return cls(Numbers(), num_replicas=2, rank=0)


SHARE = "a DistributedSampler gives this rank's share already; leave it out, run.loader shares out by itself"
REFUSED = {
    "a share": ({"sampler": share_of()}, SHARE),
    "a share of a subclass": ({"sampler": share_of(OwnShare)}, SHARE),
    "a share within": ({"sampler": Around(share_of())}, SHARE),
    "a share in batches": ({"batch_sampler": BatchSampler(share_of(), 2, drop_last=False)}, SHARE),
    "a share of a subclass in batches": ({"batch_sampler": BatchSampler(share_of(OwnShare), 2, drop_last=False)}, SHARE),
    "a share deep within": ({"batch_sampler": BatchSampler(Around(Around(share_of())), 2, drop_last=False)}, SHARE),
    "no length": ({"sampler": (index for index in range(3))}, "sampler: a generator has no length, so an epoch has no end"),
    "no length of batches": ({"batch_sampler": iter([[1]])}, "batch_sampler: a list_iterator has no length, so an epoch has no end"),
    "no length below": (
        {"batch_sampler": BatchSampler(iter([1]), 2, drop_last=False)},
        "batch_sampler: a BatchSampler has no length, so an epoch has no end",
    ),
    "nothing": ({"sampler": []}, "0 samples are too few for 1 ranks"),
    "no batches": ({"batch_sampler": []}, "0 batches are too few for 1 ranks"),
    "a sampler twice": ({"sampler": [1], "batch_sampler": [[1]]}, "batch_sampler makes the batches"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_at_once_is_refused(arguments, message):
    with pytest.raises(UsageError, match=rf"^run\.loader: .*{message}"):
        make_loader(Numbers(), Share(0, 1, 7, 0), **arguments)


NO_NUMBERS = {
    "fractions": ({"sampler": [0.5, 1.5]}, "sampler must give whole numbers, indices of the dataset .*float"),
    "names": ({"sampler": ["a", "b"]}, "sampler must give whole numbers, indices of the dataset"),
    "batches as samples": ({"sampler": [[1, 2], [3]]}, "sampler must give whole numbers"),
    "samples as batches": ({"batch_sampler": [1, 2]}, "batch_sampler must give whole numbers"),
    "batches of fractions": ({"batch_sampler": [[1, 2.5]]}, "batch_sampler must give whole numbers"),
    "batches of names": ({"batch_sampler": ["ab"]}, "batch_sampler must give whole numbers"),
    "nothing but a promise": ({"sampler": OfLength(list)}, "0 samples are too few for 1 ranks"),
    "no batches but a promise": ({"batch_sampler": OfLength(list)}, "0 batches are too few for 1 ranks"),
}


@pytest.mark.parametrize(("arguments", "message"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_where_the_epoch_begins_is_refused(arguments, message):
    cursor = make_loader(Numbers(), Share(0, 1, 7, 0), **arguments)[1]
    with pytest.raises(UsageError, match=rf"^run\.loader: {message}"):
        cursor.begin(cursor.create(0))


def test_fewer_than_the_ranks_are_refused_also_where_more_were_promised():
    cursor = make_loader(Numbers(), Share(0, 3, 7, 0), sampler=OfLength(lambda: [5, 6]))[1]
    with pytest.raises(UsageError, match=r"^run\.loader: 2 samples are too few for 3 ranks"):
        cursor.begin(cursor.create(0))


@pytest.mark.parametrize("name", ["sampler", "batch_sampler"])
def test_a_fault_in_the_sampler_itself_is_told_as_it_is(name):
    def broken():
        yield [1] if name == "batch_sampler" else 1
        raise TypeError("weights: None is no tensor")

    cursor = make_loader(Numbers(), Share(0, 1, 7, 0), **{name: OfLength(broken)})[1]
    with pytest.raises(TypeError, match="weights: None is no tensor"):
        cursor.begin(cursor.create(0))


def test_a_position_of_more_samples_than_the_sampler_gives_now_is_refused():
    loader = make_loader(Numbers(), Share(0, 1, 7, 2), sampler=OfLength(lambda: range(10)))[0]
    loader.batch_sampler.restore(0, {"consumed": 4, "num_samples": 12})
    with pytest.raises(CheckpointMismatchError, match="the dataset of loader 2 has 10 samples, but had 12 when the epoch was interrupted"):
        loader.batch_sampler.begin(loader.batch_sampler.create(0))
