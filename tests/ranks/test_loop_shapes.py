"""Stops at each step and each poll in every shape of loop, and kills; the run must end as if there had been none.

Real ranks in processes of their own. What is compared is the last checkpoint bit for bit, metrics.jsonl line by line, and what each
rank trained on at which step.
"""

from pathlib import Path

import pytest

from support.faults import CHAOS
from support.runs import REQUEUED, Runs, chains

pytestmark = pytest.mark.timeout(300)

SHAPES = {
    "Plain": "one loop",
    "PollFirst": "a poll before the first batch of an epoch",
    "WarmUp": "polls before the loop over epochs",
    "Evaluate": "an evaluation behind the loop, and a scheduler's step",
    "EvaluateFirst": "an evaluation before and behind it",
    "TwoLoaders": "a loop over another loader behind it",
    "Alternating": "two loaders by turns, each twice",
    "Accumulate": "two batches a step, and a poll between a batch and its step",
    "TwoSteps": "two steps a batch",
    "Break": "a break behind a step, and an evaluation",
    "BreakAndAgain": "a break behind a step, and another loop over the same loader",
    "BreakBeforeTheStep": "a break with a batch that was not trained on",
    "Twice": "the same loader twice, an evaluation and a scheduler's step between",
    "OwnEvaluation": "an evaluation over the loader that is trained on, before, between and behind",
    "Zip": "two loaders in one loop, the longer one first",
    "ZipOther": "two loaders in one loop, the shorter one first",
    "Cycle": "a second loader that begins anew within an epoch",
    "CycleKept": "the same, with an iterator that outlives its epoch",
    "Nested": "a loop in the body of another one",
    "NestedBehind": "a loop in the body of another one, behind its step",
    "Turns": "steps by turns with batches of two loaders",
    "EpochDraw": "draws where an epoch begins, which decide on its loops",
    "ByStep": "loops that depend on the step at which the epoch began",
    "LoaderEachEpoch": "a loader that is made in each epoch",
    "EvaluateBeforeStep": "an evaluation between a batch and its step",
    "EvaluateWithinQuiet": "an evaluation behind a step in the loop's body",
    "EvaluateWithin": "the same, with polls in it",
    "SwapWithin": "average weights in the model's place in such an evaluation",
    "EvaluateAndBreak": "such an evaluation, and a break",
    "Kept": "an iterator that is kept in a variable, and a break",
    "KeptLate": "an iterator that is finalized within the next loop over its loader",
    "Numbered": "batches that are numbered",
    "Sampler": "a sampler with replacement",
    "Batches": "a batch sampler",
    "Iterable": "an iterable dataset and another loader by turns",
    "IterableTwice": "an iterable dataset twice an epoch",
    "IterableBreak": "an iterable dataset, left by a break and looped over again",
    "Average": "weights averaged behind an epoch's loop",
    "AverageByHand": "weights averaged behind it through .data",
    "AverageFirst": "weights averaged where an epoch begins",
    "NormalizedBreak": "BatchNorm, a break, and an evaluation around DDP",
    "NormalizedAverage": "BatchNorm, and an average with statistics of its own",
}
ON_TWO_RANKS = (
    "Evaluate",
    "Alternating",
    "Break",
    "Cycle",
    "Turns",
    "EpochDraw",
    "Sampler",
    "IterableTwice",
    "AverageOnMain",
    "AverageFirst",
    "NormalizedAverage",
)


@pytest.fixture(scope="module")
def runs(forked_ranks, tmp_path_factory, same_state):
    script = Path(__file__).parents[1] / "scripts" / "loops.py"
    return Runs(forked_ranks, script, tmp_path_factory.mktemp("shapes"), same_state)


def stopped_everywhere(runs, shape, world):
    whole = runs.whole(world, f"args.shape={shape}")
    for number, stops in enumerate(chains(whole.places(), shape)[0 if CHAOS else -1 :]):
        made = runs.run(f"{shape} {world} {number}", world, f"args.shape={shape}", stops=stops)
        # One alone may come too late to matter.
        assert len(made.outputs) > 1 or len(stops) == 1, "it was not stopped"
        runs.assert_same(whole, made)


@pytest.mark.parametrize("shape", [pytest.param(name, id=words) for name, words in SHAPES.items()])
def test_stops_leave_no_trace_in_the_result(runs, shape):
    stopped_everywhere(runs, shape, 1)


@pytest.mark.parametrize("shape", ON_TWO_RANKS)
def test_stops_of_two_ranks_leave_no_trace_in_the_result(runs, shape):
    stopped_everywhere(runs, shape, 2)


@pytest.mark.parametrize("shape", ["Break", "TwoSteps"])
def test_a_stop_in_the_very_step_before_a_break_does_not_lose_the_break(runs, shape):
    whole = runs.whole(1, f"args.shape={shape}")
    stops = [place for place in whole.places() if place.startswith("step")]
    runs.assert_same(whole, runs.run(f"{shape} at each step", 1, f"args.shape={shape}", stops=stops))


@pytest.mark.parametrize(
    ("shape", "world"), [("EvaluateFirst", 1), ("EvaluateWithinQuiet", 1), ("Alternating", 1), ("Break", 1), ("Evaluate", 2)]
)
def test_kills_cost_what_was_behind_the_last_checkpoint_and_nothing_else(runs, shape, world):
    arguments = (f"args.shape={shape}", "checkpoint.every_steps=2")
    whole = runs.whole(world, *arguments)
    made = runs.run(f"{shape} {world} killed", world, *arguments, kills=whole.places()[:: 1 if CHAOS else 3])
    runs.assert_same(whole, made)
    assert len(made.steps()) > len(whole.steps()), "nothing was lost"


def test_a_change_behind_the_last_step_has_a_stop_wait_for_the_end_of_the_epoch(runs):
    made = runs.run("waits", 1, "args.shape=Average", stops=["poll 1.3"])
    assert "note: average: changed behind the last step, so a stop waits for the next one or the epoch's end" in made.outputs[0]
    saved = [event for event in made.events() if event["event"] == "saved"]
    assert [(event["epoch"], event["step"], event["reason"]) for event in saved[1:2]] == [(1, 12, "every_epochs")]
    assert len(made.outputs) == 2


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_of_a_model_with_statistics_does_not_delay_a_stop(runs, world):
    whole = runs.whole(world, "args.shape=Normalized")
    made = runs.run(f"statistics {world}", world, "args.shape=Normalized", stops=["poll 1.1"])
    runs.assert_same(whole, made)
    assert "so a stop waits" not in "".join(made.outputs)
    if world == 1:  # two agree on a place behind it
        (stopped,) = (event for event in made.events() if event["event"] == "saved" and event["reason"] == "stop")
        assert (stopped["epoch"], stopped["step"]) == (1, 12)
        assert (made.folder / "places.0").read_text().splitlines().count("poll 1.4") == 1, "it did not stop at once"


def evaluated(made):
    """Return what each rank's evaluations gave; those that were made again behind a stop count once if they gave the same."""
    return [sorted(set((made.folder / f"evaluated.{rank}").read_text().splitlines())) for rank in range(made.world)]


def test_an_evaluation_around_ddp_behind_a_break_gives_the_same_on_all_ranks_and_behind_stops(runs):
    whole = runs.whole(2, "args.shape=NormalizedBreak")
    outputs, others = evaluated(whole)
    assert outputs == others
    assert len({line.split(maxsplit=2)[2] for line in outputs}) == 3, "not another model in each epoch"
    for number, stops in enumerate(chains([place for place in whole.places() if place.startswith("poll")], "NormalizedBreak")):
        made = runs.run(f"NormalizedBreak {number}", 2, "args.shape=NormalizedBreak", stops=stops)
        # One alone may come too late to matter.
        assert len(made.outputs) > 1 or len(stops) == 1, "it was not stopped"
        assert evaluated(made) == [outputs] * 2
        runs.assert_same(whole, made)


@pytest.mark.parametrize("shape", ["NormalizedFirst", "NormalizedKept", "NormalizedOutside"])
def test_an_evaluation_around_ddp_where_an_epoch_begins_gives_the_same_on_all_ranks_and_behind_restarts(runs, shape):
    whole = runs.whole(2, f"args.shape={shape}", "args.epochs=3")
    for epochs in (1, 2, 3):
        made = runs.run(f"{shape} by epochs", 2, f"args.shape={shape}", f"args.epochs={epochs}")
        assert "NOT bit-exact" not in made.outputs[0]
    runs.assert_same(whole, made)
    assert evaluated(made) == evaluated(whole)
    outputs, others = evaluated(whole)
    assert outputs == others


@pytest.mark.parametrize("shape", ["Outside", "OutsideBehind"])
def test_a_restart_says_that_steps_were_made_outside_of_any_loop(runs, shape):
    made = runs.run(f"{shape} told", 1, f"args.shape={shape}", stops=["step 17"])
    assert "steps of this epoch were made outside of run.batches" in made.outputs[1]
    assert "NOT bit-exact from here on" in made.outputs[1]


@pytest.mark.parametrize("shape", ["LeftOver", "LeftOverBreak"])
def test_a_restart_says_that_gradients_were_left_over(runs, shape):
    made = runs.run(f"{shape} told", 1, f"args.shape={shape}", stops=["poll 0.101"])
    reason = "batches came behind the last step of a loop: gradients that were accumulated from them begin anew"
    assert f"NOT bit-exact from here on: {reason}" in made.outputs[1]
    assert "NOT bit-exact" not in made.outputs[0]


def test_a_script_that_does_not_come_back_to_the_loop_is_told_so(runs):
    made = runs.run("missed", 1, "args.shape=Missed", stops=["step 2"])
    assert "note: NOT bit-exact: this epoch was to go on with a loop over loader 0, and the script has not come to it" in made.outputs[1]
    assert "NOT bit-exact" not in made.outputs[0]


def test_batches_are_refused_to_another_thread(runs):
    attempt = runs.attempt("thread", 1, "args.shape=InAThread")
    assert attempt.codes == [1]
    assert "UsageError: run.batches: ask for batches in the thread that has made the run" in attempt.outputs[0]


def test_a_loop_that_is_left_without_a_step_behind_a_restart_is_over(runs):
    whole = runs.whole(1, "args.shape=BreakBeforeTheStep")
    made = runs.run("left without a step", 1, "args.shape=BreakBeforeTheStep", stops=["step 3", "step 4"])
    assert len(made.outputs) == 3
    runs.assert_same(whole, made)


def test_a_stop_in_a_loop_within_another_one_waits_for_that_one_and_says_so(runs):
    made = runs.run("nested told", 1, "args.shape=Nested", stops=["step 2"])
    assert "note: a stop waits for the next batch of loader 1, or the end of its loop, whose body this is" in made.outputs[0]
    assert next(event["step"] for event in made.events() if event["event"] == "saved") == 6


def test_a_stop_in_a_warm_up_of_a_later_attempt_loses_nothing(runs):
    arguments = ("twice", 1, "args.shape=WarmUp")
    for place in ("step 9", "warm-up 0"):
        assert runs.attempt(*arguments, HPCCKPT_TEST_STOPS=place).codes == [REQUEUED]
    runs.assert_same(runs.whole(*arguments[1:]), runs.run(*arguments))


def saved(made):
    return [(event["epoch"], event["step"], event["reason"]) for event in made.events() if event["event"] == "saved"]


def test_a_stop_behind_the_loop_takes_the_place_of_a_checkpoint_of_its_last_step(runs):
    arguments = (1, "args.shape=Evaluate", "checkpoint.every_steps=6")
    made = runs.run("last step", *arguments, stops=["poll 0.1"])
    assert saved(made)[:3] == [(0, 6, "every_steps"), (0, 6, "stop"), (0, 6, "every_epochs")]
    runs.assert_same(runs.whole(*arguments), made)


def test_a_stop_before_anything_is_done_behind_a_restart_saves_nothing(runs):
    arguments = ("at once", 1, "args.shape=PollFirst")
    for place in ("step 3", "poll 0.1"):
        assert runs.attempt(*arguments, HPCCKPT_TEST_STOPS=place).codes == [REQUEUED]
    made = runs.run(*arguments)
    assert saved(made)[:2] == [(0, 3, "stop"), (0, 6, "every_epochs")]
    runs.assert_same(runs.whole(*arguments[1:]), made)


def test_a_signal_behind_the_last_epoch_is_too_late_to_matter(runs):
    made = runs.run("late", 1, "args.shape=Plain", stops=["poll 2.101"])
    runs.assert_same(runs.whole(1, "args.shape=Plain"), made)
