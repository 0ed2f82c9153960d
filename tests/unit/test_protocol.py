"""The agreement's protocol under thousands of schedules: a simulated clock, a simulated store, ranks that train, wish, die and freeze.

What `Agreement` does with threads and the store is done here by processes of the simulation, around the same `Member`s.
HPCCKPT_CHAOS=1 runs ten times as many schedules.
"""

import heapq
import itertools
import os
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.distributed import protocol
from hpcckpt.distributed.protocol import STRENGTH, Asked, Decided, GaveUp, Left, Member, Wished

TIMES = 10 if os.environ.get("HPCCKPT_CHAOS") else 1
TICKS = 10
ANSWERS_S = 60.0
# gloo's and NCCL's; much longer than any deadline of the agreement.
COLLECTIVES_S = 10_000.0


class StoreLostError(Exception):
    """The connection to rank 0 is gone."""


class CollectiveFailedError(Exception):
    """A collective with a rank that is not there any more."""


class Clock:
    """Runs generators: one yields the seconds it sleeps, or (condition, timeout_s), and is sent whether the condition came true."""

    def __init__(self, is_stopped):
        self.now, self.numbers, self.asleep, self.waiting = 0.0, itertools.count(), [], []
        # is_stopped(rank, thread) -> seconds until it may run; inf for ever
        self.is_stopped = is_stopped

    def start(self, rank, thread, process):
        heapq.heappush(self.asleep, (self.now, next(self.numbers), (rank, thread, process), None, None))

    def run(self):
        """Run until nothing can happen any more."""
        while self.asleep:
            self.now, _, (rank, thread, process), waiting, sent = heapq.heappop(self.asleep)
            if waiting is not None and waiting not in self.waiting:
                continue  # its condition came true before the timeout
            stopped_s = self.is_stopped(rank, thread)
            if stopped_s:
                if stopped_s < float("inf"):
                    heapq.heappush(self.asleep, (self.now + stopped_s, next(self.numbers), (rank, thread, process), waiting, sent))
                continue
            if waiting is not None:
                self.waiting.remove(waiting)
            self._resume(rank, thread, process, sent)
            self._wake()

    def _resume(self, rank, thread, process, sent):
        try:
            wanted = process.send(sent)
        except StopIteration:
            return
        number = next(self.numbers)
        if isinstance(wanted, tuple):
            waiting = (number, wanted[0], (rank, thread, process))
            self.waiting.append(waiting)
            if wanted[1] < float("inf"):
                heapq.heappush(self.asleep, (self.now + wanted[1], number, (rank, thread, process), waiting, False))
        else:
            heapq.heappush(self.asleep, (self.now + wanted, number, (rank, thread, process), None, None))

    def _wake(self):
        for waiting in [waiting for waiting in self.waiting if waiting[1]()]:
            self.waiting.remove(waiting)
            heapq.heappush(self.asleep, (self.now, next(self.numbers), waiting[2], None, True))


@dataclass(frozen=True)
class Fault:
    """What happens to a rank at an instant: it dies, is frozen as by SIGSTOP, for a while or for ever, or only its training is stuck."""

    kind: str
    at: float


@dataclass(frozen=True)
class Schedule:
    """What ranks do, and how fast."""

    world_size: int
    # (rank, ticks it has counted) -> wish; TICKS: behind the last one
    wishes: dict
    # rank -> when its signal was latched
    latched: dict
    # tick -> collectives before it
    collectives: dict
    paces: list
    delays: list
    seed: int
    faults: dict = field(default_factory=dict)


@dataclass
class Rank:
    """What a rank did."""

    member: Member = field(default_factory=Member)
    place: int = 0
    closing: bool = False
    acted: list = field(default_factory=list)
    error: str | None = None
    # "ended", "agreement" or "collective"
    end: str | None = None
    listens: bool = True


class Simulation:
    """Runs a schedule."""

    def __init__(self, schedule):
        self.schedule, self.random = schedule, random.Random(schedule.seed)
        self.clock = Clock(self.stopped_s)
        self.ranks = [Rank() for _ in range(schedule.world_size)]
        self.log, self.counts, self.answers, self.arrived, self.wished = [], [], {}, {}, []
        for rank in range(schedule.world_size):
            self.clock.start(rank, "listener", self.listen(rank))
            self.clock.start(rank, "training", self.training(rank))
        self.clock.run()

    def fault_of(self, rank):
        fault = self.schedule.faults.get(rank)
        return fault.kind if fault is not None and self.clock.now >= fault.at else None

    def stopped_s(self, rank, thread):
        kind = self.fault_of(rank)
        if kind == "paused":
            return max(self.schedule.faults[rank].at + 1.5 * ANSWERS_S - self.clock.now, 0.0)
        return float("inf") if kind in {"dead", "frozen"} or (kind == "stuck" and thread == "training") else 0.0

    # The store: rank 0's process serves it.

    def delay(self, rank):
        return min(self.random.expovariate(1.0) * self.schedule.delays[rank], 4.0)

    def reach(self, rank):
        yield self.delay(rank)
        if self.fault_of(0) == "frozen":
            yield (lambda: False), float("inf")
        if self.fault_of(0) == "paused":
            yield self.stopped_s(0, "server")
        if self.fault_of(0) == "dead":
            raise StoreLostError

    def write(self, rank, message, place):
        text = protocol.encode(message)
        while True:
            yield from self.reach(rank)
            if place == len(self.log):
                self.log.append(text)
                self.counts.append(max(rank.member.ticks for rank in self.ranks))
            found = protocol.decode(self.log[place])
            yield self.delay(rank)
            if protocol.is_met(message, found):
                return
            place += 1

    def say(self, rank, message):
        def process(place):
            try:
                yield from self.write(rank, message, place)
            except StoreLostError:
                return

        self.clock.start(rank, "writer", process(self.ranks[rank].place))

    # What the background thread of `Agreement` does.

    def listen(self, rank):
        me = self.ranks[rank]
        try:
            while True:
                yield (lambda: len(self.log) > me.place or self.fault_of(0) == "dead"), float("inf")
                yield from self.reach(rank)
                message = protocol.decode(self.log[me.place])
                me.place += 1
                round_ = me.member.round
                answer = me.member.read(message)
                if me.closing and isinstance(message, Left):
                    break
                if answer is not None:
                    yield from self.reach(rank)
                    self.answers[round_, rank] = answer
                    if rank == 0:
                        yield from self.conclude(round_)
        except StoreLostError:
            me.member.lose("rank 0 is gone")
        me.listens = False

    def conclude(self, round_):
        everyone = range(len(self.ranks))
        yield (lambda: all((round_, rank) in self.answers for rank in everyone)), ANSWERS_S
        answers = [self.answers.get((round_, rank)) for rank in everyone]
        yield from self.write(0, protocol.outcome(answers, {}, ANSWERS_S), self.ranks[0].place)

    # What a training script does.

    def training(self, rank):
        me, schedule = self.ranks[rank], self.schedule
        try:
            for tick in range(1, TICKS + 1):
                for number in range(schedule.collectives.get(tick, 0)):
                    yield from self.meet(rank, (tick, number))
                yield self.random.random() * schedule.paces[rank]
                self.wish(rank)
                wish = yield from self.tick(rank)
                if wish is not None:
                    me.acted.append((tick, wish))
                    yield from self.meet(rank, (tick, "save"))
                if wish == "stop":
                    break
            self.wish(rank)
            yield from self.meet(rank, "end")
            me.end = "ended"
        except CollectiveFailedError:
            me.end = "collective"
        except TimeoutError as error:
            me.end, me.error = "agreement", str(error)
        me.closing = True
        self.say(rank, Left(f"rank {rank}"))
        yield (lambda: not me.listens), 10.0

    def wish(self, rank):
        me = self.ranks[rank]
        planned = self.schedule.wishes.get((rank, me.member.ticks))
        for wish in [planned] if planned else []:
            self.wish_for(rank, wish)
        if self.schedule.latched.get(rank, float("inf")) <= self.clock.now:
            self.wish_for(rank, "stop")

    def wish_for(self, rank, wish):
        me = self.ranks[rank]
        self.wished.append((rank, me.member.ticks, wish))
        if me.member.wish(wish):
            self.say(rank, Wished(wish))

    def tick(self, rank):
        member = self.ranks[rank].member
        member.ticks += 1
        if member.ticks < member.hold_at:
            return None
        yield (lambda: member.failure is not None or not member.is_held), 2 * ANSWERS_S
        if member.is_held:
            raise TimeoutError(member.failure or "no decision from rank 0")
        return member.act()

    def meet(self, rank, place):
        arrived = self.arrived.setdefault(place, set())
        arrived.add(rank)
        late = lambda: set(range(len(self.ranks))) - arrived  # noqa: E731
        is_gone = lambda other: self.fault_of(other) == "dead" or self.ranks[other].end in {"agreement", "collective"}  # noqa: E731
        has_met = yield (lambda: not late() or any(is_gone(other) for other in late())), COLLECTIVES_S
        if late() or not has_met:
            raise CollectiveFailedError


def decisions(log):
    """Return (tick, wish) of each round of a list of messages."""
    decided, wish = [], None
    for message in map(protocol.decode, log):
        if isinstance(message, Wished):
            wish = max(wish, message.wish, key=STRENGTH.__getitem__)
        elif isinstance(message, Decided):
            decided.append((message.tick, wish))
            wish = None
    return decided


@st.composite
def schedules(draw, faults=(), least=2):
    world_size = draw(st.integers(least, 5))
    ranks = st.integers(0, world_size - 1)
    seconds = st.floats(0, 30, allow_nan=False)
    speed = st.sampled_from([0.0, 0.01, 0.3, 3.0])
    each = {"min_size": world_size, "max_size": world_size}
    return Schedule(
        world_size=world_size,
        wishes=draw(st.dictionaries(st.tuples(ranks, st.integers(0, TICKS)), st.sampled_from(["save", "stop"]), max_size=5)),
        latched=draw(st.dictionaries(ranks, seconds, max_size=world_size)),
        collectives=draw(st.dictionaries(st.integers(1, TICKS), st.integers(0, 2), max_size=TICKS)),
        paces=draw(st.lists(speed, **each)),
        delays=draw(st.lists(speed, **each)),
        seed=draw(st.integers(0, 2**32)),
        faults=draw(st.dictionaries(ranks, st.builds(Fault, st.sampled_from(faults), seconds), min_size=1, max_size=world_size - 1))
        if faults
        else {},
    )


def assert_nobody_hangs(simulation):
    live = [rank for rank in range(len(simulation.ranks)) if simulation.fault_of(rank) in {None, "paused"}]
    assert all(simulation.ranks[rank].end for rank in live), [simulation.ranks[rank] for rank in live]
    return live


def assert_all_do_the_same(ranks):
    """One may have come further than another one; none did anything else."""
    furthest = max((rank.acted for rank in ranks), key=len)
    assert all(rank.acted == furthest[: len(rank.acted)] for rank in ranks), [rank.acted for rank in ranks]


@settings(max_examples=500 * TIMES)
@given(schedules())
def test_all_ranks_act_on_every_wish_at_the_same_ticks_and_nobody_hangs(schedule):
    done = Simulation(schedule)

    assert [rank.end for rank in done.ranks] == ["ended"] * schedule.world_size, [(rank.end, rank.error) for rank in done.ranks]
    assert not any(rank.listens for rank in done.ranks)
    assert not any(isinstance(protocol.decode(text), GaveUp) for text in done.log)
    decided = decisions(done.log)
    assert all(earlier < later for (earlier, _), (later, _) in itertools.pairwise(decided))
    last = done.ranks[0].member.ticks
    for rank in done.ranks:
        assert rank.member.ticks == last
        assert rank.acted == [decision for decision in decided if decision[0] <= last]
    assert all(any(count < tick and wished == wish for _, count, wished in done.wished) for tick, wish in decided)
    # Where one is for the last tick of all, or behind it, there is no tick left for the next.
    for rank, count, wished in done.wished:
        if count < last and all(tick < last for tick, _ in decided):
            assert any(tick > count and STRENGTH[wish] >= STRENGTH[wished] for tick, wish in decided), (rank, count, wished)
    # As soon as can be: behind the furthest rank, or behind the decision before.
    written = [count for text, count in zip(done.log, done.counts, strict=True) if isinstance(protocol.decode(text), Decided)]
    assert all(
        tick <= max(furthest, before) + 1 for (tick, _), furthest, (before, _) in zip(decided, written, [(0, None), *decided], strict=False)
    )


@settings(max_examples=300 * TIMES)
@given(schedules(faults=("dead", "frozen")))
def test_ranks_that_are_gone_are_named_and_nobody_waits_for_them(schedule):
    done = Simulation(schedule)

    live = assert_nobody_hangs(done)
    assert_all_do_the_same(done.ranks)
    gone = set(range(schedule.world_size)) - set(live)
    have_left = {rank for rank in live if done.ranks[rank].end != "ended"}
    for text in done.log:
        if isinstance(message := protocol.decode(text), GaveUp):
            assert {int(name.removeprefix("rank ")) for name in message.ranks.split(", ")} <= gone, message
    for rank in live:
        if (error := done.ranks[rank].error) is not None:
            named = {other for other in range(schedule.world_size) if f"rank {other}" in error}
            assert named, error
            assert named <= gone or (named <= have_left and "has left" in error), (error, gone)


@settings(max_examples=100 * TIMES)
@given(schedules(), st.data())
def test_ranks_that_are_gone_from_the_start_are_named_all_of_them_on_every_rank_that_is_held(schedule, data):
    gone = data.draw(st.sets(st.integers(1, schedule.world_size - 1), min_size=1))
    held = Schedule(
        **{
            **vars(schedule),
            "collectives": {},
            "wishes": {(0, 0): "stop"},
            "latched": {},
            "faults": {rank: Fault("frozen", 0.0) for rank in gone},
        }
    )

    done = Simulation(held)

    names = ", ".join(f"rank {rank}" for rank in sorted(gone))
    assert done.ranks[0].error == f"there is no answer in 60 s from {names}: gone, or it hangs; see its log"
    # Others are done before they read of the wish, or are held for it.
    assert {done.ranks[rank].error for rank in set(range(schedule.world_size)) - gone} <= {done.ranks[0].error, None}


@settings(max_examples=100 * TIMES)
@given(schedules(faults=("paused",)))
def test_a_rank_that_was_given_up_and_comes_back_does_nothing_on_its_own(schedule):
    done = Simulation(schedule)

    assert_nobody_hangs(done)
    assert_all_do_the_same(done.ranks)


@settings(max_examples=100 * TIMES)
@given(schedules(faults=("stuck",)))
def test_a_decision_needs_no_ranks_training(schedule):
    """A training that is stuck is no rank that is gone: what is decided then is for its collectives, and for `whereabouts`."""
    done = Simulation(schedule)

    assert_nobody_hangs(done)
    assert_all_do_the_same(done.ranks)
    assert not any(isinstance(protocol.decode(text), GaveUp) for text in done.log)


def test_a_stop_that_is_wished_while_a_save_is_decided_comes_right_behind_it():
    member = Member()
    assert member.read(Wished("save")) == 0
    member.read(Decided(3))
    assert member.wish("stop")
    assert not member.wish("stop"), "it is on its way"
    assert member.read(Wished("stop")) == 3, "it will have acted on the first"
    member.read(Decided(4))
    acted = []
    for _ in range(5):
        member.ticks += 1
        assert not member.is_held
        acted.append(member.act())
    assert acted == [None, None, "save", "stop", None]


def test_a_wish_that_another_ones_decision_has_overtaken_still_holds_its_rank_if_the_store_is_lost_then():
    member = Member()
    assert member.wish("stop")
    assert member.read(Wished("save")) == 0
    member.read(Decided(1))
    member.lose("the store is lost")
    member.ticks += 1
    assert member.act() == "save"
    member.ticks += 1
    assert not member.wish("stop")
    assert member.is_held


def test_of_wishes_in_one_round_the_strongest_is_decided():
    member = Member()
    assert [member.read(Wished("save")), member.read(Wished("stop")), member.read(Wished("save"))] == [0, None, None]
    member.read(Decided(1))
    member.ticks += 1
    assert member.act() == "stop"


@pytest.mark.parametrize("message", [Wished("save"), Decided(7), GaveUp("rank 1, rank 2", 60.0), Left("rank 3 (n1, pid 5)"), Asked()])
def test_messages_are_read_as_they_were_written(message):
    assert protocol.decode(protocol.encode(message).encode()) == message


def test_a_wish_serves_for_weaker_ones_and_any_leaving_for_ones_own():
    assert protocol.is_met(Wished("save"), Wished("stop"))
    assert not protocol.is_met(Wished("stop"), Wished("save"))
    assert protocol.is_met(Left("rank 1"), Left("rank 2"))
    assert not protocol.is_met(Wished("stop"), Left("rank 2"))
    assert not protocol.is_met(Decided(3), Wished("stop"))
