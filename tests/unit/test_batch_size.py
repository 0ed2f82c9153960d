"""The global batch is kept on any number of ranks; what cannot be kept is said."""

from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.data import BatchSize

SIZES, WORLDS = st.integers(1, 512), st.integers(1, 64)


def through(asked, worlds, saved=None):
    """Return the sizes of attempts on these numbers of ranks, each going on from the one before."""
    sizes = []
    for world_size in worlds:
        sizes.append(BatchSize.kept(asked, world_size, saved))
        saved = sizes[-1].state()
    return sizes


@given(SIZES, WORLDS)
def test_a_first_attempt_takes_what_the_script_says(asked, world_size):
    assert BatchSize.kept(asked, world_size, None) == BatchSize(asked, asked * world_size, asked)
    assert BatchSize.kept(asked, world_size, None).note(0, world_size) is None


@given(SIZES, WORLDS, st.lists(WORLDS, max_size=8))
def test_the_global_batch_comes_back_with_the_first_number_of_ranks(asked, world_size, others):
    first, *_, last = through(asked, [world_size, *others, world_size])
    assert last == first
    assert last.note(0, world_size) is None


@given(SIZES, WORLDS, st.lists(WORLDS, max_size=5), WORLDS)
def test_what_a_rank_takes_does_not_depend_on_the_attempts_between(asked, first, others, last):
    assert through(asked, [first, *others, last])[-1] == through(asked, [first, last])[-1]


@given(SIZES, WORLDS, WORLDS)
def test_the_global_batch_is_the_nearest_that_ranks_share_evenly(asked, before, now):
    size = through(asked, [before, now])[-1]
    assert size.per_rank >= 1
    error = abs(size.per_rank * now - size.together)
    assert all(error <= abs(other * now - size.together) for other in (size.per_rank - 1, size.per_rank + 1) if other >= 1)
    assert error == 0 or size.together % now


@given(SIZES, WORLDS, WORLDS)
def test_the_note_says_what_is_not_as_it_was(asked, before, now):
    size = through(asked, [before, now])[-1]
    note = size.note(3, now)
    if size.per_rank * now != asked * before:
        assert note == (
            f"loader 3: the global batch is {size.per_rank * now} now ({now} ranks x {size.per_rank}), not {asked * before} as before, "
            f"which {now} ranks cannot share evenly"
        )
    elif now != before:
        assert note == f"loader 3: the global batch of {asked * before} is kept: each rank takes {size.per_rank} at a time, not {asked}"
    else:
        assert note is None


@given(SIZES, st.lists(WORLDS, min_size=1, max_size=4), SIZES, st.lists(WORLDS, min_size=1, max_size=4))
def test_another_size_in_the_script_is_obeyed_and_kept_from_then_on(asked, worlds, changed, more_worlds):
    before = through(asked, worlds)[-1]
    after = through(changed, more_worlds, before.state())
    if changed == asked:
        assert after[0].together == before.together
    else:
        assert after == through(changed, more_worlds)


@given(SIZES, WORLDS, WORLDS)
def test_its_state_is_plain_and_enough(asked, before, now):
    size = through(asked, [before, now])[-1]
    assert size.state() == {"asked": asked, "together": asked * before}
    assert BatchSize.kept(asked, now, size.state()) == size
