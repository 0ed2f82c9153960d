"""The loop over epochs is left before its end, or is over and gone on with; the run ends as one that was never left.

Real ranks in processes of their own; see test_loop_shapes.py.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from support.runs import DONE, REQUEUED, Runs, chains

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def runs(forked_ranks, tmp_path_factory, same_state):
    script = Path(__file__).parents[1] / "scripts" / "loops.py"
    return Runs(forked_ranks, script, tmp_path_factory.mktemp("leaving"), same_state)


def checkpoints(folder):
    return sorted((path.name, path.read_bytes()) for path in (folder / "checkpoints").glob("*.pt"))


def saved(made):
    return [(event["epoch"], event["step"], event["reason"]) for event in made.events() if event["event"] == "saved"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("shape", "first", "later"),
    [
        pytest.param("Leaving", "args.max_steps=4", "args.max_steps=1000", id="a return within an epoch"),
        pytest.param("Leaving", "args.max_steps=6", "args.max_steps=1000", id="a return behind the last step of an epoch, or of two"),
        pytest.param("Leaving", "args.max_steps=1", "args.max_steps=2", id="a return behind the first step, and then the second"),
        pytest.param("EarlyStop", "args.patience=0", "args.patience=1000", id="a break behind an evaluation"),
        pytest.param("EarlyStop", "args.patience=1", "args.patience=2", id="a break at another place than before"),
        pytest.param("BreakFirst", "args.leaves=true", "args.leaves=false", id="a break before any step of an epoch"),
    ],
)
def test_a_run_that_was_left_and_submitted_again_ends_as_one_that_never_was(runs, request, world, shape, first, later):
    name = request.node.callspec.id
    left = runs.run(name, world, f"args.shape={shape}", first)
    assert left.outcome() == "finished"
    assert left.events()[-1]["early"] is True
    assert "has left its loop" in left.outputs[0]
    steps, before = left.steps(), checkpoints(left.folder)
    assert left.events()[-1]["step"] == steps[-1]

    again = runs.run(name, world, f"args.shape={shape}", later)

    assert "bit-exact: restored" in again.outputs[0]
    assert checkpoints(again.folder) != before
    whole = runs.whole(world, f"args.shape={shape}", later)
    assert again.steps() == whole.steps(), "no step twice, and none left out"
    runs.assert_same(whole, again)


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_script_again_leaves_at_the_same_place(runs, world):
    arguments = (f"early {world}", world, "args.shape=EarlyStop", "args.patience=1")
    first = runs.run(*arguments)
    before = checkpoints(first.folder), first.metrics(), first.steps()
    again = runs.run(*arguments)
    assert (checkpoints(again.folder), again.metrics(), again.steps()) == before
    assert again.outcome() == "finished"


@pytest.mark.parametrize(
    ("shape", "limit", "world"),
    [
        ("Leaving", "args.max_steps=8", 1),
        ("EarlyStop", "args.patience=1", 1),
        ("Leaving", "args.max_steps=4", 2),
        ("EarlyStop", "args.patience=1", 2),
    ],
)
def test_stops_on_the_way_do_not_move_the_place_at_which_a_run_is_left(runs, shape, limit, world):
    arguments = (world, f"args.shape={shape}", limit)
    whole = runs.whole(*arguments)
    for number, stops in enumerate(chains(whole.places(), shape)[0 if world == 1 else -1 :]):
        made = runs.run(f"{shape} {world} stopped {number}", *arguments, stops=stops)
        runs.assert_same(whole, made)
        assert made.steps() == whole.steps()
        assert made.outcome() == "finished"


def test_a_kill_behind_a_checkpoint_of_the_last_step_does_not_move_it_either(runs):
    arguments = (1, "args.shape=Leaving", "args.max_steps=8", "checkpoint.every_steps=1")
    whole = runs.whole(*arguments)
    runs.assert_same(whole, runs.run("killed", *arguments, kills=whole.places()))


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_loaded_behind_the_loop_is_not_saved_as_the_newest_state(runs, world):
    arguments = (f"best {world}", world, "args.shape=LoadsTheBest")
    left = runs.run(*arguments, "args.patience=1")
    assert "not saved, because of model, which changed since" in left.outputs[0]
    assert left.outcome() == "finished"
    assert saved(left)[-1][2] == "every_epochs"
    again = runs.run(*arguments, "args.patience=1000")
    # What was behind the newest checkpoint is done again, to the same end.
    whole = runs.whole(world, "args.shape=EarlyStop", "args.patience=1000")
    assert again.trace() == whole.trace()


@pytest.mark.parametrize("world", [1, 2])
def test_leaving_between_a_batch_and_its_step_goes_on_with_that_batch(runs, world):
    arguments = (f"between {world}", world, "args.shape=BreakBetween")
    left = runs.run(*arguments, "args.leaves=true")
    assert left.outcome() == "finished"
    assert left.events()[-1]["step"] == 8
    again = runs.run(*arguments, "args.leaves=false")
    runs.assert_same(runs.whole(world, "args.shape=BreakBetween", "args.leaves=false"), again)


CLOSINGS = {"finally": "in finally", "with": "with", "except": "where it is caught", "behind": "in finally, where another one is caught"}


@pytest.mark.parametrize("how", ["fails", "interrupted"])
@pytest.mark.parametrize("closing", [pytest.param(name, id=words) for name, words in CLOSINGS.items()])
@pytest.mark.parametrize("world", [1, 2])
def test_an_exception_saves_nothing_and_fails(runs, world, how, closing):
    name = f"{how} {closing} {world}"
    arguments = (world, "args.shape=Raises", f"args.closing={closing}")
    attempt = runs.attempt(name, *arguments, f"args.leaves={how}")
    assert all(code not in (DONE, REQUEUED) for code in attempt.codes), attempt
    folder = runs.folder / name
    made = runs.run(name, *arguments, "args.leaves=''")
    assert all(event["reason"] == "every_epochs" for event in made.events() if event["event"] == "saved")
    kinds = Counter(event["event"] for event in made.events())
    assert kinds["failed"] == (world if how == "fails" else 0)
    assert kinds["finished"] == 1
    assert folder == made.folder
    runs.assert_same(runs.whole(world, "args.shape=Leaving"), made)


@pytest.mark.parametrize("how", ["fails", "interrupted"])
@pytest.mark.parametrize("world", [1, 2])
def test_an_exception_that_is_caught_around_the_loop_leaves_it_as_a_break_does(runs, world, how):
    arguments = (f"caught {how} {world}", world, "args.shape=Raises", "args.caught=true")
    left = runs.run(*arguments, f"args.leaves={how}")
    assert left.outcome() == "finished"
    again = runs.run(*arguments, "args.leaves=''")
    runs.assert_same(runs.whole(world, "args.shape=Leaving"), again)


@pytest.mark.parametrize("closing", [pytest.param(name, id=words) for name, words in CLOSINGS.items() if name != "with"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_script_without_a_context_manager_ends_as_well(runs, world, closing):
    arguments = (world, "args.shape=Leaving", f"args.closing={closing}")
    made = runs.run(f"{closing} {world}", *arguments, stops=["step 3"])
    assert made.outcome() == "finished"
    assert "early" not in made.events()[-1]
    runs.assert_same(runs.whole(world, "args.shape=Leaving"), made)
    left = runs.run(f"{closing} left {world}", *arguments, "args.max_steps=4")
    assert (left.outcome(), left.events()[-1]["early"], left.events()[-1]["step"]) == ("finished", True, 4)
    assert saved(left)[-1][1:] == (4, "left")


@pytest.mark.parametrize("closing", [pytest.param(name, id=words) for name, words in CLOSINGS.items()])
@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_fails_where_a_run_is_left_is_told_and_what_was_saved_before_is_gone_on_with(runs, world, closing):
    name = f"full {closing} {world}"
    arguments = (world, "args.shape=LeavesOnAFullDisk", f"args.closing={closing}")
    attempt = runs.attempt(name, *arguments, "args.patience=1", "args.full=true")
    assert attempt.codes == [1] * world, attempt.outputs
    message = r"CheckpointSaveError: .*/checkpoint_epoch0001_step\d+\.pt: .*\(File too large\); the ones before it are intact"
    for output in attempt.outputs:
        assert re.match(rf"hpcckpt\.errors\.{message}", output.splitlines()[-1]), output
        assert output.count("hpcckpt.errors.CheckpointSaveError") == 1, "it failed again on the way out"
    again = runs.run(name, *arguments, "args.patience=1")
    failed = [event for event in again.events() if event["event"] == "failed"]
    assert sorted(event["rank"] for event in failed) == list(range(world))
    assert all(re.match(message, event["error"]) for event in failed)
    assert (again.outcome(), Counter(event["event"] for event in again.events())["finished"]) == ("finished", 1)
    runs.assert_same(runs.whole(*arguments[:2], "args.patience=1"), again)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_finished_run_goes_on_where_there_are_more_epochs_and_ends_at_once_where_there_are_not(runs, world, every):
    arguments = (world, "args.shape=Evaluate", f"checkpoint.every_epochs={every}")
    name = f"epochs {world} {every}"
    made = runs.run(name, *arguments, "args.epochs=3")
    before = checkpoints(made.folder), made.metrics(), made.trace()
    for epochs in (3, 1):
        made = runs.run(name, *arguments, f"args.epochs={epochs}")
        assert (checkpoints(made.folder), made.metrics(), made.trace()) == before
        assert made.outcome() == "finished"
        assert "early" not in made.events()[-1]
    runs.assert_same(runs.whole(*arguments, "args.epochs=5"), runs.run(name, *arguments, "args.epochs=5", stops=["poll 3.2"]))


@pytest.mark.parametrize("worlds", [(2, 1, 2), (1, 2, 1)], ids=["2, 1, 2 ranks", "1, 2, 1 ranks"])
def test_a_schedule_made_from_the_number_of_batches_goes_on_counting_right_on_other_numbers_of_ranks(runs, worlds):
    steps = 3 * 12 // (2 * worlds[0])
    name, shape = f"worlds {worlds[0]}", "args.shape=OneCycle"
    whole = runs.whole(worlds[0], shape)
    for world, stop in zip(worlds, (2, steps // 2, None), strict=True):
        attempt = runs.attempt(name, world, shape, **({} if stop is None else {"HPCCKPT_TEST_STOPS": f"step {stop}"}))
        assert attempt.codes == [DONE if stop is None else REQUEUED] * world, attempt.outputs
        kept = f"the global batch of {2 * worlds[0]} is kept" in attempt.outputs[0]
        assert kept == (world != worlds[0]), attempt.outputs
    rates = [line for line in whole.metrics() if "rate" in line]
    again = [line for line in (runs.folder / name / "metrics.jsonl").read_text().splitlines() if "rate" in line]
    assert [line[: line.index(', "loss"')] if "loss" in line else line for line in rates] == [
        line[: line.index(', "loss"')] if "loss" in line else line for line in again
    ]
    seen = Counter()
    for path in (runs.folder / name).glob("trace.*"):
        for line in path.read_text().splitlines():
            _, _, epoch, *samples = line.split()
            seen.update((int(epoch), int(sample)) for sample in samples)
    assert seen == Counter({(epoch, sample): 1 for epoch in range(3) for sample in range(12)})
