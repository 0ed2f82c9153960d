"""What happens to one rank happens to all: errors are passed on, and nobody waits."""

from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "together.py")


@pytest.fixture(scope="module")
def lines(module_ranks):
    attempt = module_ranks.run([SCRIPT], 3)
    assert attempt.codes == [0, 0, 0], attempt.outputs
    return [dict(line.partition(" ")[::2] for line in output.splitlines() if not line.startswith("[")) for output in attempt.outputs]


def on_all(lines, case):
    return [rank.get(case) for rank in lines]


def test_rank_0s_result_is_everybodys(lines):
    assert on_all(lines, "value") == ["'from 0'"] * 3


def test_rank_0s_error_is_raised_on_every_rank_with_its_class_and_message(lines):
    assert on_all(lines, "error") == ["CheckpointSaveError: disk full"] * 3
    assert on_all(lines, "builtin") == ["FileNotFoundError: no such thing"] * 3


def test_an_error_that_cannot_be_sent_arrives_by_its_text(lines):
    assert on_all(lines, "foreign") == ["OddError: 1 2"] + ["RankFailedError: rank 0 failed: OddError: 1 2"] * 2


def test_what_cannot_be_sent_leaves_nobody_waiting(lines):
    assert on_all(lines, "unsendable")[0].startswith("ValueError: <function")
    assert all(line.startswith("RankFailedError: rank 0 failed: ValueError: <function") for line in on_all(lines, "unsendable")[1:])
    assert on_all(lines, "unsendable-value") == ["RankFailedError"] * 3


def test_one_ranks_failure_at_something_done_together_is_named_on_the_others(lines):
    assert on_all(lines, "together") == [
        "RankFailedError: rank 1 failed: ValueError: bad file",
        "ValueError: bad file",
        "RankFailedError: rank 1 failed: ValueError: bad file",
    ]
    assert on_all(lines, "fine") == ["0", "1", "2"]
    assert on_all(lines, "gather") == ["[0, 10, 20]"] * 3


def test_the_bucket_order_is_settled_before_training_and_stays(lines):
    assert on_all(lines, "settled") == ["True"] * 3
    assert on_all(lines, "same-buckets-later") == ["True"] * 3


@pytest.mark.parametrize("what", ["untouched", "no-gradients", "same-generator", "really-training"])
def test_settling_the_bucket_order_leaves_no_trace(lines, what):
    assert on_all(lines, what) == ["True"] * 3


@pytest.mark.parametrize("kind", ["unused", "static", "sparse", "plain"])
def test_modules_whose_graph_the_stand_in_would_misrepresent_are_left_alone(lines, kind):
    assert on_all(lines, f"left-alone-{kind}") == ["True"] * 3


def test_a_compiled_ddp_is_settled_too_and_still_computes(lines):
    assert on_all(lines, "compiled") == ["True (4, 2)"] * 3
