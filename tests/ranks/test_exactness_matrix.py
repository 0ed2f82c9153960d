"""The evidence for the one sentence: three kinds of training on one, two and four ranks, stopped at every place and at random ones.

Real gloo ranks in processes of their own, real signals. What is compared is everything that a run leaves: the last checkpoint bit for
bit, metrics.jsonl line by line, and what each rank trained on at which step.
"""

import itertools
import json
import random
import shutil
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from support.faults import CHAOS, scaled

SCRIPT = Path(__file__).parents[1] / "scripts" / "matrix.py"
pytestmark = pytest.mark.timeout(scaled(300, 3000))

REQUEUED, DONE = 144, 0
WORLDS = (1, 2, 4)
# All of them are for a machine with more than two cores.
WORKERS = [*itertools.product((1, 2, 4), (1, 3))] if CHAOS else [(1, 3), (2, 1), (4, 1)]
# Stops in an evaluation make no step; a chain of them must not look like a run without progress.
PATIENT = ("requeue.max_stalled=1000", "requeue.max_requeues=1000")


@dataclass(frozen=True)
class Cell:
    """One row of the matrix."""

    workload: str
    world: int
    arguments: tuple[str, ...] = ()

    def __str__(self):
        return " ".join((self.workload, str(self.world), *self.arguments))


def with_workers(cell, workers):
    """Three workers outlive the epoch, one does not."""
    return replace(cell, arguments=(*cell.arguments, f"args.workers={workers}", f"args.persistent={str(workers == 3).lower()}"))


def steps_of(lines):
    return [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "log"]


class Matrix:
    """Runs of cells; the undisturbed run of each is made once."""

    def __init__(self, ranks, folder, same_state):
        self.ranks, self.folder, self.same_state = ranks, folder, same_state
        self.known = {}
        # A job keeps its id over all attempts, and ranks of other jobs on this machine must not meet it.
        self.jobs = defaultdict(lambda: uuid.uuid4().hex)
        self.attempts = 0

    def attempt(self, run_dir, cell, signals=(), exact=False):
        """Run once. Returns where it stopped, None at its end, and the places it had reached."""
        self.attempts += 1
        argv = [SCRIPT, run_dir, f"args.workload={cell.workload}", *PATIENT, *cell.arguments]
        environ = {"HPCCKPT_TEST_SIGNALS": "|".join(signals), "HPCCKPT_TEST_EXACT": str(int(exact))}
        attempt = self.ranks.run(argv, cell.world, environ, job_id=self.jobs[run_dir])
        # All ranks together.
        assert attempt.codes in ([REQUEUED] * cell.world, [DONE] * cell.world), (attempt.codes, "\n".join(attempt.outputs))
        said = [output.splitlines() for output in attempt.outputs]
        stops = {tuple(line.removeprefix("stopped at ") for line in lines if line.startswith("stopped at ")) for lines in said}
        assert len(stops) == 1, f"ranks stopped at different places: {stops}"
        stopped = next(iter(stops))
        assert (attempt.codes[0] == REQUEUED) == bool(stopped)
        self.says_inexact = any(phrase in line for line in said[0] for phrase in ("NOT bit-exact", "no longer bit-exact"))
        return (stopped[0] if stopped else None), [line.removeprefix("reached ") for line in said[0] if line.startswith("reached ")]

    def whole(self, cell):
        """Return the directory of the cell's undisturbed run, and its places."""
        if cell not in self.known:
            run_dir = self.folder / f"whole {self.attempts}"
            stopped, places = self.attempt(run_dir, cell)
            assert stopped is None
            self.known[cell] = run_dir, places
        return self.known[cell]

    def assert_same(self, first, second, world):
        """Assert that two runs left the same."""
        assert self.ids(first, world) == self.ids(second, world), "ids"
        self.same_state(first, second)
        metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (first, second)]
        assert metrics[0] == metrics[1], "metrics"
        assert steps_of(metrics[0]) == list(range(1, len(steps_of(metrics[0])) + 1))

    def ids(self, run_dir, world):
        """Return the lines "epoch step ids…" of each rank."""
        return [(run_dir / f"ids.{rank}").read_text().splitlines() for rank in range(world)]

    def stop_at(self, run_dir, cell, place, behind, chance, cell_now=None):
        """Have attempts that go on behind one place (None: begin) stop at another."""
        ranks = chance.sample(range(cell.world), 1 if cell.world == 1 or chance.random() < 0.7 else 2)
        for _ in range(20):
            places = places_behind(behind, self.whole(cell)[1])
            before = places[max(places.index(place) - 1, 0)]
            # Ranks that are all signalled act at once; else they agree on the place behind the signal, or on its own if all answer soon.
            signalled = place if len(ranks) == cell.world else before
            stopped, _ = self.attempt(run_dir, cell_now or cell, [f"{rank}@{signalled}" for rank in ranks], exact=True)
            if stopped == place:
                return
            assert stopped == before, f"signalled at {signalled}, stopped at {stopped}"
            behind = further(behind, stopped, self.whole(cell)[1])
        pytest.fail(f"no stop at {place} in 20 attempts")


def further(behind, stopped, places):
    """Return the place behind which the next attempt goes on: a stop where an epoch begins is one behind the epoch before, or nothing."""
    kind, _, number = stopped.partition(" ")
    if kind != "begin":
        return stopped
    reached = [behind, *([f"end {int(number) - 1}"] if number != "0" else [])]
    return max(reached, key=lambda place: -1 if place is None else places.index(place))


def places_behind(stopped, places):
    """Return the places of an attempt that goes on behind a stop, of those of the whole run."""
    if stopped is None:
        return places
    kind, _, number = stopped.partition(" ")
    index = places.index(stopped)
    if kind == "end":
        return places[index + 1 :]
    begin = next(place for place in reversed(places[: index + 1]) if place.startswith("begin"))
    if kind == "evaluation":  # from its beginning
        return [begin, *places[places.index(f"evaluation {number.partition('.')[0]}.0") :]]
    return [begin, *places[index + 1 :]]


def places_to_stop_at(places, world):
    """Return all that a stop can be made to fall at: behind the last epoch none does, and several ranks pass their first place."""
    return [place for place in places[:-1] if world == 1 or not place.startswith("begin")]


@pytest.fixture(scope="module")
def module_matrix(forked_ranks, tmp_path_factory, same_state):
    return Matrix(forked_ranks, tmp_path_factory.mktemp("matrix"), same_state)


@pytest.fixture
def matrix(module_matrix):
    yield module_matrix
    module_matrix.ranks.end_children()


CELLS = [Cell(workload, world) for workload in ("mlp", "cnn", "transformer") for world in WORLDS]


def stop_everywhere(matrix, cell, run_dir, workers=()):
    """Stop a run at each of its places in turn, and let it end; `workers` are those of one attempt after the other."""
    _, places = matrix.whole(cell)
    targets = places_to_stop_at(places, cell.world)
    assert len([place for place in targets if place.startswith("step")]) == 14
    chance = random.Random(str(cell))
    following = itertools.cycle(workers)
    behind = None
    for place in targets:
        matrix.stop_at(run_dir, cell, place, behind, chance, with_workers(cell, next(following)) if workers else None)
        behind = place
    assert matrix.attempt(run_dir, with_workers(cell, next(following)) if workers else cell)[0] is None


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_run_that_is_stopped_at_every_place_in_turn_ends_as_if_it_had_not_been(matrix, tmp_path, cell):
    stop_everywhere(matrix, cell, tmp_path / "run")
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", cell.world)


def test_so_does_one_that_evaluates_with_the_statistics_that_each_rank_has(matrix, tmp_path):
    """BatchNorm's buffers differ between ranks from one forward pass through DDP to the next."""
    cell = Cell("cnn", 2, ('args.evaluates="each rank\'s own"',))
    stop_everywhere(matrix, cell, tmp_path / "run")
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", 2)


@pytest.mark.parametrize(("world", "workers"), WORKERS)
def test_so_does_one_whose_workers_augment_at_random(matrix, tmp_path, world, workers):
    cell = with_workers(Cell("cnn", world), workers)
    stop_everywhere(matrix, cell, tmp_path / "run")
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", world)


@pytest.mark.parametrize(("world", "workers"), WORKERS)
def test_the_number_of_workers_changes_nothing(matrix, world, workers):
    cell = Cell("cnn", world)
    matrix.assert_same(matrix.whole(cell)[0], matrix.whole(with_workers(cell, workers))[0], world)


@pytest.mark.parametrize("world", WORLDS if CHAOS else (2,))
def test_nor_does_another_number_of_workers_behind_each_stop(matrix, tmp_path, world):
    cell = Cell("cnn", world)
    stop_everywhere(matrix, cell, tmp_path / "run", workers=(0, 3, 1))
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", world)


@pytest.mark.skipif(not CHAOS, reason="one run for each place; HPCCKPT_CHAOS=1 does it")
@pytest.mark.parametrize("cell", [*CELLS, *(with_workers(Cell("cnn", world), workers) for world, workers in WORKERS)], ids=str)
def test_a_run_that_is_stopped_once_ends_as_if_it_had_not_been_wherever_that_was(matrix, tmp_path, cell):
    whole, places = matrix.whole(cell)
    for place in places[:-1]:
        run_dir = tmp_path / place
        # By any rank: with several, the stop falls here or at the next place; the others may be at the first step of an epoch by the time
        # that one hears of a signal at the end of the epoch before.
        stopped, _ = matrix.attempt(run_dir, cell, [f"{random.Random(place).randrange(cell.world)}@{place}"], exact=True)
        assert stopped in places[places.index(place) :][: 3 if place.startswith("end") else 2] or (stopped is None and place == places[-2])
        if stopped is not None:
            assert matrix.attempt(run_dir, cell)[0] is None
        matrix.assert_same(whole, run_dir, cell.world)
        shutil.rmtree(run_dir)


STOPS = 20
LONG = ("args.epochs=6",)


@pytest.mark.parametrize("seed", range(scaled(1, 10)))
@pytest.mark.parametrize("cell", [replace(cell, arguments=LONG) for cell in CELLS], ids=str)
def test_a_longer_run_that_is_stopped_at_random_ends_as_if_it_had_not_been(matrix, tmp_path, cell, seed):
    """By any rank, sometimes by two, sometimes in the middle of a step."""
    stops = stop_at_random(matrix, cell, tmp_path / "run", f"{cell} {seed}")
    assert len(stops) >= STOPS, f"seed {cell} {seed}: {stops}"
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", cell.world)


@pytest.mark.parametrize("seed", range(scaled(1, 10)))
@pytest.mark.parametrize(("world", "workers"), WORKERS if CHAOS else [(2, 3)])
def test_so_does_a_longer_one_whose_workers_augment_at_random(matrix, tmp_path, world, workers, seed):
    cell = with_workers(Cell("cnn", world, LONG), workers)
    stops = stop_at_random(matrix, cell, tmp_path / "run", f"{cell} {seed}")
    assert len(stops) >= STOPS, f"seed {cell} {seed}: {stops}"
    matrix.assert_same(matrix.whole(cell)[0], tmp_path / "run", world)


def stop_at_random(matrix, cell, run_dir, seed):
    """Stop a run at random places to its end, at about 20 of them; returns where."""
    chance = random.Random(seed)
    _, places = matrix.whole(cell)
    stops, behind = [], None
    while True:
        # A stop comes at the next place or, of a signal that is late, a few behind that; enough must be left for the others.
        left = places_behind(behind, places)
        room = (len(left) - 8) // max(STOPS - len(stops), 1) - 2
        target = left[min(chance.randint(1, max(room, 1)), len(left) - 1)]
        ranks = chance.sample(range(cell.world), min(chance.choice((1, 1, 2)), cell.world))
        signals = [f"{rank}@{target}" + (f"+{chance.uniform(0, 0.003):.4f}" if chance.random() < 0.3 else "") for rank in ranks]
        stopped, _ = matrix.attempt(run_dir, cell, signals, exact=True)
        if stopped is None:
            return stops
        stops.append(stopped)
        behind = further(behind, stopped, places)


@pytest.mark.parametrize(
    ("cell", "differs"),
    [
        pytest.param(Cell("mlp", 1, ("args.inexact='seeds anew'",)), "checkpoint.model", id="dropout seeded anew behind each start"),
        pytest.param(Cell("mlp", 2, ("args.inexact='forgets the momentum'",)), "checkpoint.model", id="an optimizer that is not tracked"),
        pytest.param(Cell("cnn", 2, ("args.augment=own",)), "checkpoint.model", id="augmentation from a generator of the dataset's own"),
    ],
)
def test_a_script_that_does_not_resume_exactly_is_seen_to_differ(matrix, tmp_path, cell, differs):
    whole, places = matrix.whole(cell)
    matrix.stop_at(tmp_path / "run", cell, places_to_stop_at(places, cell.world)[3], None, random.Random(1))
    assert matrix.attempt(tmp_path / "run", cell)[0] is None
    assert matrix.ids(whole, cell.world) == matrix.ids(tmp_path / "run", cell.world)
    with pytest.raises(AssertionError, match=differs):
        matrix.assert_same(whole, tmp_path / "run", cell.world)


def spoil_checkpoint(run_dir, change):
    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text())
    path = run_dir / "checkpoints" / pointer["file"]
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def next_float(tensor):
    tensor.view(-1).view(torch.int32)[-1] += 1


def one_byte(tensor):
    tensor[-1] += 1


SPOILED = {
    "model": lambda content: next_float(list(content["model_state_dict"].values())[-1]),
    "optimizer": lambda content: next_float(content["optimizer_state_dict"]["state"][0]["exp_avg"]),
    "scheduler": lambda content: content["scheduler_state_dict"].update(last_epoch=0),
    "ema": lambda content: next_float(list(content["ema_state_dict"].values())[-1]),
    "rng_state": lambda content: one_byte(content["rng_state"][1]["torch"]),
    "metrics": lambda content: content["metrics"].update(loss=0.0),
}


@pytest.mark.parametrize("what", [*SPOILED, "metrics.jsonl", "ids.1"])
def test_the_smallest_change_in_anything_that_is_compared_is_seen(matrix, tmp_path, what):
    cell, run_dir = Cell("transformer", 2), tmp_path / "run"
    whole = matrix.whole(cell)[0]
    shutil.copytree(whole, run_dir)
    matrix.assert_same(whole, run_dir, 2)
    if what in SPOILED:
        spoil_checkpoint(run_dir, SPOILED[what])
    else:
        lines = (run_dir / what).read_text().splitlines()
        (run_dir / what).write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(AssertionError, match={"metrics.jsonl": "metrics", "ids.1": "ids"}.get(what, f"checkpoint.{what}")):
        matrix.assert_same(whole, run_dir, 2)


def trained_on(run_dir, epoch):
    """Return how often each sample was trained on in an epoch, by all ranks."""
    lines = [line.split() for path in run_dir.glob("ids.*") for line in path.read_text().splitlines()]
    return Counter(int(word) for line in lines if line[0] == str(epoch) for word in line[2:])


def change_worlds(matrix, run_dir, samples, worlds, jumps, arguments=()):
    """Run an epoch with one number of ranks after the other, each stopped behind a few steps; the last ends it. Returns all worlds."""
    arguments = (f"args.samples={samples}", "args.epochs=1", *arguments)
    step, taken, before = 0, [], None
    for world, jump in zip(worlds, [*jumps, None], strict=True):
        cell = Cell("mlp", world, arguments)
        signals = [f"{world - 1}@step {step + jump}"] if jump else []
        stopped, _ = matrix.attempt(run_dir, cell, signals, exact=True)
        assert before in (None, world) or matrix.says_inexact, "another number of ranks, and nobody said that it is no longer bit-exact"
        taken.append(world)
        before = world
        if stopped is None:
            break
        kind, _, number = stopped.partition(" ")
        step = int(number) if kind == "step" else step
    else:
        assert stopped is None
    return taken


ORDERS = [tuple(random.Random(seed).choices(range(1, 5), k=5)) for seed in range(scaled(3, 20))]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("worlds", [(4, 2, 3, 1, 4), *ORDERS], ids=str)
def test_an_epoch_that_changes_hands_between_worlds_has_each_sample_once(matrix, tmp_path, worlds, drop_last):
    samples = 163  # uneven for all of them; a batch is 3 a rank
    taken = change_worlds(matrix, tmp_path / "run", samples, worlds, (2, 1, 2, 3), (f"args.drop_last={str(drop_last).lower()}",))
    assert taken == list(worlds), "each number of ranks had its part"
    seen = trained_on(tmp_path / "run", 0)
    if drop_last:
        assert set(seen.values()) == {1}
        # Less than one global batch is left out, which may be that of any of them.
        assert samples - 3 * max(worlds) < len(seen) <= samples
    else:
        assert seen == Counter(range(samples))


@pytest.mark.parametrize("seed", range(scaled(20, 200)))
def test_so_has_one_with_any_worlds_and_stops(matrix, tmp_path, seed):
    chance = random.Random(seed)
    samples = chance.randint(30, 70)
    worlds = [chance.randint(1, 4) for _ in range(chance.randint(2, 5))]
    taken = change_worlds(matrix, tmp_path / "run", samples, worlds, [chance.randint(1, 4) for _ in worlds[1:]])
    seen = trained_on(tmp_path / "run", 0)
    assert set(seen) == set(range(samples)), f"seed {seed}: worlds {worlds}"
    # Where fewer samples were left than ranks came, some ranks were given one that another has, once.
    more = sum(seen.values()) - samples
    alone = last_batch(tmp_path / "run")
    assert more == 0 or (more < taken[-1] and len(set(alone)) + more == len(alone) == taken[-1]), f"seed {seed}: worlds {worlds}, {seen}"


def last_batch(run_dir):
    """Return what all ranks trained on at the last step."""
    lines = [line.split() for path in run_dir.glob("ids.*") for line in path.read_text().splitlines()]
    last = max(int(line[1]) for line in lines)
    return [word for line in lines if int(line[1]) == last for word in line[2:]]
