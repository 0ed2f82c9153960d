"""Loops of every shape over the loaders of an epoch, interrupted anywhere, against the same that were not.

A small script of loops is run as `Run` runs one: `batches` and `step` call what `run.batches` and `run.step` do.
"""

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from hpcckpt.data import Loops, Share, make_loader
from hpcckpt.errors import CheckpointMismatchError, UsageError


class Numbers(Dataset):
    """Sample i of loader k is 100k + i."""

    def __init__(self, number, size):
        self.number, self.size = number, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return 100 * self.number + index


SIZES = (9, 4, 6)
EPOCHS = 2


class Stopped(Exception):  # noqa: N818 - as SystemExit, which it stands for
    """The run was stopped, or left."""


@dataclass(frozen=True)
class Train:
    """A loop with a step for every `every` batches; over at its `last` batch's step, if that comes before the end."""

    loader: int
    every: int = 1
    last: int = 99
    # Evaluate on the first batches of this one before each step.
    within: int | None = None


@dataclass(frozen=True)
class Evaluate:
    """A loop without steps, over behind so many batches."""

    loader: int
    last: int = 99


@dataclass(frozen=True)
class Zip:
    """Steps with a batch of each of two loaders, as many as the shorter has."""

    first: int
    second: int


@dataclass(frozen=True)
class Nested:
    """For each batch of the outer one a whole loop over the inner, with a step of the outer one alone first, where there is one."""

    outer: int
    inner: int
    steps_first: bool
    # Behind the first steps of it the inner loop is over.
    last: int = 99


@dataclass(frozen=True)
class Turns:
    """A step with a batch of the first, then some with one of the second, which begins anew where it is exhausted."""

    first: int
    second: int
    times: int = 1


@dataclass(frozen=True)
class Rest:
    """Steps with a batch of each, as many as the shorter has; then with what is left of the second."""

    first: int
    second: int


@dataclass
class State:
    """What a checkpoint has; generators draw in evaluations, too, and so what they are at is part of it."""

    epoch: int = 0
    trained: tuple = ()
    drawn: int = 0
    data: dict | None = None


@dataclass
class Attempt:
    """One attempt at the script; `stop` is the place (a step, or something between loops) at which it is stopped."""

    script: list
    state: State
    stop: int | None = None
    places: int = 0
    is_due: bool = False
    seen: list = field(default_factory=list)

    def __post_init__(self):
        self.loops, self.epoch, self.trained, self.drawn = Loops(), self.state.epoch, self.state.trained, self.state.drawn
        self.boundary, self.loaders = None, []
        for number, size in enumerate(SIZES):
            loader, place, batch_size = make_loader(Numbers(number, size), Share(0, 1, 7, number), batch_size=2, shuffle=True)
            self.loops.add(loader, place, batch_size)
            self.loaders.append(loader)
        saved = self.state.data
        if saved is not None:
            self.loops.restore(self.epoch, saved["loaders"], saved["last_loader"], saved["unplaced_steps"])

    def go(self):
        """Return the state to go on from, and whether it is the end."""
        try:
            while self.epoch < EPOCHS:
                self.boundary = self.drawn
                for number, loop in enumerate(self.script):
                    self.run(loop)
                    self.drawn += number  # a scheduler's step, say, or an initialization
                    self.poll()
                self.loops.end_epoch()
                self.epoch += 1
                self.boundary = None
                if self.is_due:
                    self.save()
        except Stopped:
            return self.saved, False
        return State(self.epoch, self.trained, self.drawn), True

    def batches(self, number):
        loader = self.loaders[number]
        return self.iterate(loader, *self.loops.create(loader, self.epoch))

    def iterate(self, loader, place, loop):
        if self.loops.begin(place, loop, self.epoch):
            self.drawn = self.state.drawn
        is_exhausted = False
        try:
            if not place.is_skipped:
                for batch in loader:
                    place.advance()
                    yield batch.tolist()
                    self.loops.refuse_if_over(place, loop)
                    if not place.in_progress and self.loops.is_between_batches:
                        self.boundary = None if self.loops.leads == [place] else self.boundary
                        self.may_stop(place)
            is_exhausted = True
        finally:
            if place.loop is loop:
                is_lead = self.loops.end(place, is_exhausted=is_exhausted)
                if is_lead or (self.boundary is None and not self.loops.leads):
                    self.boundary = self.drawn

    def step(self, *batches):
        self.trained = (*self.trained, (self.epoch, self.drawn, *batches))
        self.drawn += 7
        self.boundary = None
        self.loops.step()
        self.be_signalled()
        self.may_stop()

    def poll(self):
        self.loops.stay()
        if self.loops.is_between_batches:
            self.be_signalled()
            self.may_stop()

    def be_signalled(self):
        self.is_due |= self.places == self.stop
        self.places += 1

    def may_stop(self, place=None):
        if self.is_due and self.loops.waits(place) is None:
            self.save()

    def save(self):
        drawn = self.drawn if self.boundary is None else self.boundary
        self.saved = State(self.epoch, self.trained, drawn, copy.deepcopy(self.loops.data_state(self.epoch)))
        raise Stopped

    def run(self, loop):
        match loop:
            case Train():
                waiting = []
                for batch in self.batches(loop.loader):
                    waiting.append(batch)
                    is_last = sum(entry[0] == self.epoch for entry in self.trained) >= loop.last
                    if len(waiting) < loop.every:
                        continue
                    if is_last:
                        break
                    if loop.within is not None:
                        self.run(Evaluate(loop.within, 2))
                    self.step(*waiting)
                    waiting = []
            case Evaluate():
                seen = []
                for number, batch in enumerate(self.batches(loop.loader)):
                    if number == loop.last:
                        break
                    seen.append(batch)
                    self.drawn += 1
                    self.poll()
                self.seen.append((self.epoch, loop, seen))
            case Zip():
                for first, second in zip(self.batches(loop.first), self.batches(loop.second), strict=False):
                    self.step(first, second)
            case Nested():
                for outer in self.batches(loop.outer):
                    if loop.steps_first:
                        self.step(outer)
                    for number, inner in enumerate(self.batches(loop.inner), 1):
                        self.step(outer, inner)
                        if number == loop.last:
                            break
                    self.drawn += 3
            case Turns():
                others = self.batches(loop.second)
                for first in self.batches(loop.first):
                    self.step(first)
                    for _ in range(loop.times):
                        other = next(others, None)
                        if other is None:
                            others = self.batches(loop.second)
                            other = next(others)
                        self.step(other)
                        self.drawn += 2
            case Rest():
                others = self.batches(loop.second)
                for first in self.batches(loop.first):
                    other = next(others, None)
                    if other is None:
                        break
                    self.step(first, other)
                for other in others:
                    self.step(other)


def uninterrupted(script):
    attempt = Attempt(script, State())
    end, is_end = attempt.go()
    assert is_end
    return attempt, end


def assert_as_if_never_stopped(script, stops):
    whole, end = uninterrupted(script)
    state, seen = State(), []
    for stop in [*stops, None]:
        attempt = Attempt(script, copy.deepcopy(state), stop)
        state, is_end = attempt.go()
        seen += attempt.seen
        if is_end:
            break
    assert is_end
    assert state.trained == end.trained
    assert state.drawn == end.drawn
    for evaluation in whole.seen:
        assert evaluation in seen, "an evaluation is missing, or saw something else"


SCRIPTS = {
    "train": [Train(0)],
    "train twice": [Train(0), Train(0)],
    "train three times": [Train(0), Train(0), Train(0)],
    "train and evaluate on the same": [Train(0), Evaluate(0)],
    "evaluate first on the same": [Evaluate(0), Train(0)],
    "evaluate around two on the same": [Evaluate(0), Train(0), Evaluate(0), Train(0), Evaluate(0)],
    "evaluate in part": [Evaluate(1, 1), Train(0), Evaluate(0, 2)],
    "evaluate within": [Train(0, within=1)],
    "evaluate within, then train on the same": [Train(0, within=1), Train(1), Train(0, within=1), Train(1)],
    "evaluate within, before and behind": [Evaluate(1), Train(0, within=1), Evaluate(1)],
    "two in turn": [Train(0), Train(1), Train(0), Train(1)],
    "break": [Train(0, last=3), Evaluate(1)],
    "break, then another": [Train(0, last=2), Train(1)],
    "break, then the same again": [Train(0, last=2), Evaluate(1), Train(0)],
    "accumulate": [Train(0, every=2), Evaluate(2)],
    "two at once": [Zip(0, 1), Evaluate(2)],
    "two at once, the shorter first": [Zip(1, 0)],
    "two at once, then each": [Zip(0, 1), Train(2), Train(0)],
    "two at once, twice": [Zip(0, 1), Zip(0, 1)],
    "two at once, then one of them with another": [Zip(0, 1), Zip(2, 1), Train(1)],
    "one within another": [Nested(2, 1, steps_first=False), Evaluate(0)],
    "one within another, behind its step": [Nested(2, 1, steps_first=True)],
    "one within another, left early": [Nested(2, 0, steps_first=False, last=2)],
    "one within another, then alone": [Nested(2, 1, steps_first=False), Train(1), Train(1)],
    "alone, then within another": [Train(1), Nested(2, 1, steps_first=True), Train(1)],
    "within another twice": [Nested(2, 1, steps_first=True), Train(1), Nested(2, 1, steps_first=False), Evaluate(1)],
    "by turns": [Turns(1, 2), Evaluate(0)],
    "by turns, beginning anew": [Turns(0, 1, 3), Train(1)],
    "by turns, then by turns with another": [Turns(0, 1), Turns(2, 1)],
    "two at once, and the rest of the second": [Rest(1, 0), Evaluate(2)],
    "two at once, and the rest of the second, then again": [Rest(1, 0), Train(0)],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_stopped_once_at_any_place(name):
    for stop in range(uninterrupted(SCRIPTS[name])[0].places):
        assert_as_if_never_stopped(SCRIPTS[name], [stop])


PAIRS = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda pair: pair[0] != pair[1])
LOOPS = st.one_of(
    PAIRS.map(lambda pair: Zip(*pair)),
    PAIRS.map(lambda pair: Rest(*pair)),
    st.builds(lambda pair, first, last: Nested(*pair, first, last), PAIRS, st.booleans(), st.sampled_from([1, 99])),
    st.builds(lambda pair, times: Turns(*pair, times), PAIRS, st.integers(1, 3)),
    st.builds(Train, st.integers(0, 2), within=st.sampled_from([None, 1, 2])).filter(lambda loop: loop.loader != loop.within),
    st.builds(Train, st.integers(0, 2), every=st.integers(1, 2)),
    st.builds(Evaluate, st.integers(0, 2), st.sampled_from([1, 2, 99])),
)


@settings(max_examples=60)
@given(st.lists(LOOPS, min_size=1, max_size=5), st.lists(st.integers(0, 30), max_size=6))
@example([Train(0), Evaluate(0), Train(0)], [4, 3, 0, 0])
def test_any_script_stopped_again_and_again_ends_as_if_it_never_was(script, stops):
    assert_as_if_never_stopped(script, stops)


class Leaves(Attempt):
    """Leaves the run, instead of being stopped, behind so many steps: in a loop, or behind one."""

    leaves = None

    def leave(self):
        self.loops.go_back()
        self.save()

    def run(self, loop):
        if self.leaves is None:
            super().run(loop)
            return
        how, steps = self.leaves
        for batch in self.batches(loop.loader):
            if how == "top of the body" and len(self.trained) == steps:
                break
            self.step(batch)
            if how != "top of the body" and len(self.trained) == steps:
                break
        if len(self.trained) == steps:
            if how == "break and more":
                self.loops.stay()
            self.leave()


def left(how, steps, script=(Train(0),)):
    attempt = Leaves(list(script), State())
    attempt.leaves = (how, steps)
    return attempt.go()[0]


@pytest.mark.parametrize("how", ["end of the body", "top of the body"])
@pytest.mark.parametrize("steps", range(1, 10))
def test_left_within_a_loop_the_rest_of_it_follows(how, steps):
    state = left(how, steps)
    assert len(state.trained) == steps
    end, is_end = Attempt([Train(0)], state).go()
    assert is_end
    assert [entry[2:] for entry in end.trained] == [entry[2:] for entry in uninterrupted([Train(0)])[1].trained]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_left_behind_something_that_follows_a_break_the_loop_is_over(steps):
    end, _ = Attempt([Train(0)], left("break and more", steps)).go()
    assert [entry[0] for entry in end.trained] == [0] * steps + [1] * 5


def test_left_behind_the_end_of_a_loop_that_was_not_broken_it_is_over():
    attempt = Attempt([Train(0)], State())
    attempt.run(Train(0))
    with pytest.raises(Stopped):
        Leaves.leave(attempt)
    end, _ = Attempt([Train(0)], attempt.saved).go()
    assert end.trained == uninterrupted([Train(0)])[1].trained


def test_an_iterator_that_is_left_in_a_variable_is_over_with_its_epoch():
    attempt = Attempt([], State())
    kept = attempt.batches(1)
    next(kept)
    attempt.step([])
    attempt.loops.end_epoch()
    attempt.epoch = 1
    kept.close()  # as when the variable is assigned anew
    assert attempt.loops.data_state(1)["loaders"] == {}
    attempt.run(Train(0))
    assert attempt.loops.data_state(1)["last_loader"] == "0"
    assert set(attempt.loops.data_state(1)["loaders"]) == {"0"}
    attempt.run(Train(1))
    assert attempt.loops.data_state(1)["loaders"]["1"]["loop"] == 0


def test_an_iterator_that_is_left_in_a_variable_has_no_part_in_the_steps_of_other_loops():
    attempt = Attempt([], State())
    kept = attempt.batches(1)
    next(kept)
    attempt.step([])
    before = attempt.loops.data_state(0)["loaders"]["1"]
    attempt.run(Train(0))
    assert attempt.loops.data_state(0)["loaders"]["1"] == before
    kept.close()


def test_a_stop_waits_where_nobody_knows_whether_an_iterator_that_was_kept_has_others_in_its_body():
    attempt = Attempt([], State())
    kept = attempt.batches(1)
    next(kept)
    attempt.step([])
    assert "waits for the next batch of loader 1, or the end of its loop" in attempt.loops.waits()
    attempt.run(Train(0))
    kept.close()  # at the end of the function that had it
    attempt.poll()
    assert "a stop waits for the end of the epoch: the loop over loader 1 was left early" in attempt.loops.waits()
    attempt.loops.end_epoch()
    assert attempt.loops.waits() is None


def test_a_run_that_is_left_with_nothing_behind_its_loops_knows_where_they_were():
    attempt = Attempt([], State())
    outer, inner = attempt.batches(1), attempt.batches(0)
    next(outer)
    next(inner)
    attempt.step([])
    inner.close()
    outer.close()
    attempt.loops.go_back()
    assert attempt.loops.waits() is None
    assert [attempt.loops.data_state(0)["loaders"][number]["is_over"] for number in "10"] == [False, False]


def test_steps_in_another_loop_than_that_to_go_on_with_are_told_and_end_the_repetition():
    state, _ = Attempt([Train(0)], State(), 1).go()
    attempt = Attempt([], state)
    attempt.run(Train(1))
    assert not attempt.loops.is_repeating
    attempt.run(Train(0))
    assert "this epoch was to go on with a loop over loader 0, and" in attempt.loops.end_epoch()
    assert attempt.loops.end_epoch() is None


def test_an_iterator_that_is_kept_beyond_its_loop_is_refused():
    attempt = Attempt([], State())
    first = attempt.batches(1)
    next(first)
    second = attempt.batches(1)
    next(second)
    with pytest.raises(UsageError, match="this loop is over, since its epoch is, or another one over the same loader has begun"):
        next(first)
    attempt.step([])
    assert next(second)
    attempt.step([])
    attempt.loops.end_epoch()
    attempt.epoch = 1
    with pytest.raises(UsageError, match="this loop is over"):
        next(second)
    assert attempt.loops.data_state(1)["loaders"] == {}


def test_an_iterator_that_is_finalized_late_does_not_end_the_next_loop():
    attempt = Attempt([], State())
    first = attempt.batches(1)
    next(first)
    attempt.step([])
    second = attempt.batches(1)
    next(second)
    first.close()
    attempt.step([])
    here = attempt.loops.data_state(0)["loaders"]["1"]
    assert (here["loop"], here["batches"], here["is_over"]) == (1, 1, False)


def test_a_step_in_no_loop_is_counted_as_such():
    attempt = Attempt([], State())
    attempt.step()
    assert (attempt.loops.data_state(0)["last_loader"], attempt.loops.data_state(0)["unplaced_steps"]) == (None, 1)
    attempt.loops.end_epoch()
    assert attempt.loops.data_state(1)["unplaced_steps"] == 0


@pytest.mark.parametrize("consumed", [0, 2, 6, 9])
def test_a_position_of_the_former_version_is_that_of_the_first_loop(consumed):
    old = State(data={"loaders": {"0": {"consumed": consumed, "num_samples": 9}}, "last_loader": None, "unplaced_steps": 0})
    whole = [entry[2:] for entry in uninterrupted([Train(0), Train(0)])[1].trained]
    end, _ = Attempt([Train(0), Train(0)], old).go()
    assert [entry[2:] for entry in end.trained] == whole[(consumed + 1) // 2 :]


def test_a_position_of_an_iterable_dataset_does_not_fit_one_with_a_length():
    with pytest.raises(CheckpointMismatchError, match="the dataset of loader 1 has 4 samples, but had an unknown number when the epoch"):
        Attempt([], State(data={"loaders": {"1": {"is_over": True, "num_workers": 0}}, "last_loader": "1", "unplaced_steps": 0}))


def test_what_comes_before_the_loop_that_is_gone_on_with_is_known_to_be_a_repetition():
    script = [Evaluate(1), Train(0), Evaluate(2), Train(0)]
    whole = uninterrupted(script)[0].places
    for stop in range(whole // 2):
        state, _ = Attempt(script, State(), stop).go()
        attempt = Attempt(script, state)
        was_stepped = state.data["last_loader"] is not None
        assert attempt.loops.is_repeating is was_stepped
        list(attempt.batches(1))
        assert attempt.loops.is_repeating is was_stepped
        attempt.run(Train(0))
        loop = state.data["loaders"].get("0", {}).get("loop")
        assert attempt.loops.is_repeating is (loop == 3 - 2)
        if attempt.loops.is_repeating:
            attempt.run(Train(0))
            assert not attempt.loops.is_repeating
