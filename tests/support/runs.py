"""Runs of a script that names the places in which it can be interrupted; compared with the run that was not."""

import json
import os
import random
from dataclasses import dataclass

from hpcckpt import policy
from support.faults import CHAOS

REQUEUED, DONE = 144, 0
# Stops in an evaluation make no step; a chain of them must not look like a run without progress.
PATIENT = ("requeue.max_stalled=1000", "requeue.max_requeues=1000")


@dataclass(frozen=True)
class Made:
    """A run directory, and what its attempts printed on rank 0."""

    folder: object
    world: int
    outputs: list

    def trace(self):
        """Return what each rank trained on at each step; at one that was made again behind a kill, what came of that."""
        lines = [(self.folder / f"trace.{rank}").read_text().splitlines() for rank in range(self.world)]
        return [list({line.split()[0]: line for line in of_rank}.values()) for of_rank in lines]

    def steps(self):
        """Return the steps in the order in which rank 0 made them."""
        return [int(line.split()[0]) for line in (self.folder / "trace.0").read_text().splitlines()]

    def metrics(self):
        """Return the lines of metrics.jsonl."""
        return (self.folder / "metrics.jsonl").read_text().splitlines()

    def places(self):
        """Return the places in which it can be interrupted."""
        return list(dict.fromkeys((self.folder / "places.0").read_text().splitlines()))

    def events(self):
        """Return the ledger."""
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def outcome(self):
        """Return how the ledger says that it ended."""
        return policy.outcome(self.events())[0]


class Runs:
    """Runs of one script; an undisturbed one is made once."""

    def __init__(self, ranks, script, folder, same_state):
        self.ranks, self.script, self.folder, self.same_state = ranks, script, folder, same_state
        self.whole_ones = {}

    def attempt(self, name, world, *arguments, **environ):
        """Run once; returns the exit codes and what was printed."""
        # Of this session's own: ranks of one job find each other by its id.
        job_id = f"{name.replace(' ', '-')}-{os.getpid()}"
        return self.ranks.run([self.script, self.folder / name, *PATIENT, *arguments], world, environ, job_id=job_id)

    def run(self, name, world, *arguments, stops=(), kills=()):
        """Run until it is through, over stops and kills, each of which comes once."""
        outputs = []
        while True:
            attempt = self.attempt(name, world, *arguments, HPCCKPT_TEST_STOPS="|".join(stops), HPCCKPT_TEST_KILLS="|".join(kills))
            outputs.append(attempt.outputs[0])
            assert len(outputs) < 500, "requeues forever"
            if attempt.codes == [DONE] * world:
                return Made(self.folder / name, world, outputs)
            killed = -9 in attempt.codes
            assert (kills and killed) or attempt.codes == [REQUEUED] * world, (attempt.codes, "\n".join(attempt.outputs))

    def whole(self, world, *arguments):
        """Return the undisturbed run."""
        if (world, arguments) not in self.whole_ones:
            self.whole_ones[world, arguments] = self.run(f"whole {len(self.whole_ones)}", world, *arguments)
        return self.whole_ones[world, arguments]

    def assert_same(self, first, second):
        """Assert that two runs left the same."""
        assert first.trace() == second.trace()
        assert first.metrics() == second.metrics()
        self.same_state(first.folder, second.folder)


def chains(places, seed):
    """Return sets of places to stop at, so that each place is in one at least: all, or every other one; in `make chaos` each alone, too."""
    chosen = random.Random(seed).sample(places, len(places) // 2)
    return [places, [place for place in places if place in chosen], *([[place] for place in places] if CHAOS else [])]
