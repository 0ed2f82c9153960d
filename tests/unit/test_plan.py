"""The batches of an epoch: every sample once over all ranks, wherever it was interrupted and on however many ranks it goes on."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcckpt.data.plan import EpochPlan


@st.composite
def plans(draw, drop_last=None, enough=True):
    """Return a plan; with `enough`, at least as many samples are left as there are ranks."""
    world_size, batch_size = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    num_samples = draw(st.integers(world_size if enough else 0, 150))
    start = draw(st.integers(0, num_samples - world_size if enough else num_samples))
    return EpochPlan(num_samples, world_size, batch_size, start, draw(st.booleans()) if drop_last is None else drop_last)


def batches(plan):
    """Return, for every global batch, what each rank gets."""
    return [[plan.share(batch, rank) for rank in range(plan.world_size)] for batch in range(plan.num_batches)]


def seen(plan):
    return Counter(chain.from_iterable(chain.from_iterable(batches(plan))))


@given(plans(drop_last=False))
@example(EpochPlan(9, 4, 2))  # one sample is left over behind a full batch
@example(EpochPlan(7, 4, 1))
@example(EpochPlan(4, 4, 3))
def test_every_sample_comes_exactly_once(plan):
    assert seen(plan) == Counter(range(plan.start, plan.num_samples))


@given(plans(drop_last=True))
def test_with_drop_last_full_batches_of_the_beginning_come_exactly_once(plan):
    size = plan.world_size * plan.batch_size
    whole = (plan.num_samples - plan.start) // size * size
    assert seen(plan) == Counter(range(plan.start, plan.start + whole))
    assert all(len(share) == plan.batch_size for shares in batches(plan) for share in shares)


@given(plans(enough=False))
def test_no_rank_ever_waits_for_a_batch_or_gets_an_empty_one(plan):
    assert all(len(share) > 0 for shares in batches(plan) for share in shares)


@given(plans(enough=False))
def test_no_batch_is_larger_than_asked_for_but_the_last_of_single_samples(plan):
    for number, shares in enumerate(batches(plan)):
        largest = max(map(len, shares))
        last_of_singles = plan.batch_size == 1 and number == plan.num_batches - 1 and not plan.drop_last
        assert largest <= (2 if last_of_singles else plan.batch_size)


@given(plans())
def test_the_ranks_of_a_batch_differ_by_one_sample_at_most(plan):
    for shares in batches(plan):
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(plans())
def test_a_batch_is_one_stretch_of_the_order_and_follows_the_one_before(plan):
    position = plan.start
    for number, shares in enumerate(batches(plan)):
        low, high = plan.bounds(number)
        assert low == position
        assert list(chain.from_iterable(shares)) == list(range(low, high))
        position = high
    assert plan.drop_last or position == plan.num_samples


@given(start=st.integers(0, 20), left=st.integers(1, 9), more_ranks=st.integers(1, 9), batch_size=st.integers(1, 6))
def test_where_fewer_samples_than_ranks_are_left_all_get_one_and_all_are_seen(start, left, more_ranks, batch_size):
    plan = EpochPlan(start + left, left + more_ranks, batch_size, start)
    (shares,) = batches(plan)
    assert [len(share) for share in shares] == [1] * plan.world_size
    assert set(seen(plan)) == set(range(plan.start, plan.num_samples))
    assert plan.bounds(0) == (plan.start, plan.num_samples)


@given(plans(), st.data())
def test_an_epoch_that_is_interrupted_goes_on_with_the_same_batches(plan, data):
    whole = batches(plan)
    done = data.draw(st.integers(0, len(whole)))
    consumed = plan.bounds(done - 1)[1] if done else plan.start
    rest = EpochPlan(plan.num_samples, plan.world_size, plan.batch_size, consumed, plan.drop_last)
    assert batches(rest) == whole[done:]


@given(plans(drop_last=False), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 6)), max_size=4))
def test_on_any_sequence_of_world_sizes_every_sample_still_comes_once(plan, legs):
    counted, consumed = Counter(), plan.start
    for number, world_size, batch_size in [*legs, (None, 1, 4)]:
        leg = EpochPlan(plan.num_samples, world_size, batch_size, consumed)
        for batch in range(leg.num_batches if number is None else min(number, leg.num_batches)):
            if leg.num_samples - leg.start < world_size:  # the one documented exception: ranks share what is left
                counted.update(range(*leg.bounds(batch)))
            else:
                counted.update(chain.from_iterable(leg.share(batch, rank) for rank in range(world_size)))
            consumed = leg.bounds(batch)[1]
    assert counted == Counter(range(plan.start, plan.num_samples))


@given(plans(enough=False))
def test_nothing_left_is_no_batch(plan):
    assert EpochPlan(plan.num_samples, plan.world_size, plan.batch_size, plan.num_samples, plan.drop_last).num_batches == 0


TABLE = {
    "even": (EpochPlan(8, 2, 2), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
    "smaller last": (EpochPlan(7, 2, 2), [[[0, 1], [2, 3]], [[4, 5], [6]]]),
    "last one lends": (EpochPlan(9, 2, 2), [[[0, 1], [2, 3]], [[4, 5], [6]], [[7], [8]]]),
    "first one lends": (EpochPlan(5, 2, 2), [[[0, 1], [2]], [[3], [4]]]),
    "single samples": (EpochPlan(5, 2, 1), [[[0], [1]], [[2, 3], [4]]]),
    "drop last": (EpochPlan(7, 2, 2, drop_last=True), [[[0, 1], [2, 3]]]),
    "behind a start": (EpochPlan(7, 2, 2, start=4), [[[4, 5], [6]]]),
    "too few left": (EpochPlan(7, 3, 2, start=5), [[[5], [6], [5]]]),
}


@pytest.mark.parametrize(("plan", "expected"), TABLE.values(), ids=TABLE)
def test_the_batches_of(plan, expected):
    assert [[list(share) for share in shares] for shares in batches(plan)] == expected
