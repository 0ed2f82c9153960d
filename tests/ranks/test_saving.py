"""Saves beside the training, on real ranks: what training does meanwhile, and who hears of a failure."""

import json
import re
from pathlib import Path

import pytest
import torch

from support.runs import REQUEUED, Runs

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def runs(forked_ranks, tmp_path_factory, same_state):
    script = Path(__file__).parents[1] / "scripts" / "saving.py"
    return Runs(forked_ranks, script, tmp_path_factory.mktemp("saving"), same_state)


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def world(request):
    return request.param


class Case:
    """One run of one attempt."""

    def __init__(self, runs, request, world, case, *overrides, name=""):
        self.folder = runs.folder / f"{request.node.name}{name}"
        self.attempt = runs.ranks.run([runs.script, self.folder, case, *overrides], world)
        self.text = "\n".join(self.attempt.outputs)

    def events(self, *kinds):
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] in kinds]

    def saved(self):
        return [event["step"] for event in self.events("saved")]

    def assert_whole(self):
        """Each file holds the state of its own step, however late it was written."""
        first, *others = ((event["step"], torch.load(self.folder / "checkpoints" / event["file"])) for event in self.events("saved"))
        for step, content in others:
            grown = content["model_state_dict"]["weight"] - first[1]["model_state_dict"]["weight"]
            assert content["step"] == step
            torch.testing.assert_close(grown, torch.full((30, 30), float(step - first[0])))


@pytest.fixture
def play(runs, request, world):
    return lambda case, *overrides: Case(runs, request, world, case, *overrides)


def test_training_goes_on_while_a_save_waits_for_the_disk(play, world):
    made = play("late", "checkpoint.every_steps=6")
    assert made.attempt.codes == [0] * world, made.text
    assert made.saved() == [6, 12, 12]
    assert ["stall_s" in event for event in made.events("saved")] == [True, True, False], (
        "behind the last step nothing is left to do beside it"
    )
    made.assert_whole()


def test_one_that_is_due_meanwhile_is_skipped_if_that_is_wanted(play, world):
    made = play("late", "checkpoint.when_busy=skip")
    assert made.attempt.codes == [0] * world, made.text
    assert [event["step"] for event in made.events("save_skipped")][:2] == [4, 6]
    assert made.saved()[0] == 2
    assert made.saved()[-1] == 12
    assert not {4, 6} & set(made.saved())
    made.assert_whole()


def test_a_failure_is_raised_on_every_rank_a_step_or_two_later(play, world):
    made = play("failure", "checkpoint.every_steps=5")
    assert made.attempt.codes == [1] * world, made.text
    for output in made.attempt.outputs:
        (heard,) = re.findall(r"^heard (\d+) .*No space left on device", output, re.MULTILINE)
        assert int(heard) in (7, 8), "it is known at step 7, and the next save would be at step 10"
    assert made.saved() == []
    (failed,) = made.events("save_failed")
    assert failed["step"] == 5
    assert made.events("failed")


def test_a_save_that_is_due_waits_for_the_one_before(play, world):
    made = play("none")
    assert made.attempt.codes == [0] * world, made.text
    assert made.saved() == [2, 4, 6, 8, 10, 12, 12]
    made.assert_whole()


def test_at_a_stop_what_is_on_its_way_comes_first(play, world):
    made = play("signal", "checkpoint.every_steps=2", "checkpoint.when_busy=skip")
    assert made.attempt.codes == [REQUEUED] * world, made.text
    first, *_, last = made.saved()
    assert first == 2
    assert made.events("saved")[-1]["reason"] == "stop"
    assert last >= 5
    made.assert_whole()


def test_at_a_stop_a_failure_of_the_one_before_does_not_keep_the_last_one_from_being_saved(play, world):
    made = play("signal failure", "checkpoint.when_busy=skip")
    assert made.attempt.codes == [REQUEUED] * world, made.text
    assert [event["step"] for event in made.events("save_failed")] == [2]
    (saved,) = made.events("saved")
    assert saved["reason"] == "stop"


def test_at_the_end_the_same(play, world):
    made = play("immediate failure", "checkpoint.every_steps=12")
    assert made.attempt.codes == [0] * world, made.text
    assert [event["step"] for event in made.events("save_failed")] == [12]
    (saved,) = made.events("saved")
    assert (saved["step"], saved["reason"]) == (12, "every_epochs")


@pytest.mark.parametrize(("case", "code"), [("exception", 1), ("exit", 7)])
def test_what_was_taken_before_a_mistake_of_the_script_is_there(play, world, case, code):
    made = play(case)
    assert made.attempt.codes == [code] * world, made.text
    assert made.saved() == [2, 4]
    made.assert_whole()


def test_nothing_of_it_happens_where_it_is_not_wanted(play, world):
    made = play("late", "checkpoint.async_save=false")
    assert made.attempt.codes == [0] * world, made.text
    assert all("stall_s" not in event for event in made.events("saved"))


@pytest.fixture(scope="module")
def lazily(forked_ranks, tmp_path_factory, same_state):
    script = Path(__file__).parents[1] / "scripts" / "lazily.py"
    return Runs(forked_ranks, script, tmp_path_factory.mktemp("lazily"), same_state)


def test_what_is_copied_beside_the_passes_is_what_is_copied_before_them(lazily, request, world):
    eager, lazy = (Case(lazily, request, world, "steady", f"checkpoint.staging={how}", name=how) for how in ("eager", "lazy"))
    assert lazy.attempt.codes == eager.attempt.codes == [0] * world, lazy.text
    assert lazy.saved() == eager.saved()
    assert len(lazy.saved()) > 9
    assert not lazy.events("save_failed", "note")
    for event in lazy.events("saved"):
        one, other = ((made.folder / "checkpoints" / event["file"]).read_bytes() for made in (lazy, eager))
        assert one == other, event


def test_a_copy_that_was_torn_is_no_checkpoint_and_the_next_step_is_saved_instead(lazily, request, world):
    made = Case(lazily, request, world, "changing", "checkpoint.staging=lazy")
    assert made.attempt.codes == [0] * world, made.text
    (failed,) = made.events("save_failed")
    assert failed["step"] == 4
    assert "TornError" in failed["error"]
    (note,) = made.events("note")
    assert "from here on the training waits for the copy" in note["text"]
    assert note["text"] in made.text
    first, second, *_ = made.saved()
    assert first == 2
    assert second in (5, 6), "step 6 would have been saved anyhow"
    whole = Case(lazily, request, world, "changing", "checkpoint.staging=eager", name="whole")
    for event in made.events("saved")[2:]:
        one, other = (torch.load(each.folder / "checkpoints" / event["file"]) for each in (made, whole))
        for name, value in one["model_state_dict"].items():
            assert torch.equal(value, other["model_state_dict"][name]), name
