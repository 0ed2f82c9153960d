"""Stops in every shape of loop: warm-up, evaluation with a resumable loader, gradient accumulation, two loaders, break.

One real rank in a process of its own, signalled at a chosen place; the run must end as if it had not been.
"""

from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "loops.py")
REQUEUED, DONE = [144], [0]


class Shapes:
    """Runs of one shape; the undisturbed one is made once."""

    def __init__(self, ranks, folder, same_state) -> None:
        self.ranks, self.folder, self.same_state = ranks, folder, same_state

    def run(self, shape: str, name: str, stop: int | None = None) -> list[int]:
        argv = [SCRIPT, str(self.folder / f"{shape} {name}"), f"args.shape='{shape}'"]
        attempt = self.ranks.run(argv, 1, {} if stop is None else {"HPCCKPT_TEST_STOP": str(stop)})
        assert attempt.codes in (REQUEUED, DONE), attempt.outputs
        return attempt.codes

    def trace(self, shape: str, name: str) -> list[str]:
        return (self.folder / f"{shape} {name}" / "trace").read_text().splitlines()

    def assert_as_if_undisturbed(self, shape: str, name: str) -> None:
        if not (self.folder / f"{shape} whole").exists():
            assert self.run(shape, "whole") == DONE
        assert self.run(shape, name) == DONE
        whole, stopped = self.trace(shape, "whole"), self.trace(shape, name)
        assert [line for line in stopped if "evaluated" not in line] == [line for line in whole if "evaluated" not in line]
        assert set(whole) - set(stopped) == set(), "an evaluation is missing, or saw a part only"
        assert {line.split()[2] for line in stopped if "evaluated" in line} <= {"8"}
        self.same_state(self.folder / f"{shape} whole", self.folder / f"{shape} {name}")


@pytest.fixture(scope="module")
def shapes(module_ranks, tmp_path_factory, same_state):
    return Shapes(module_ranks, tmp_path_factory.mktemp("shapes"), same_state)


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        pytest.param("poll first", 9, id="a poll before the first batch of a later epoch"),
        pytest.param("evaluate", 14, id="a step, where the evaluation uses a loader of the run"),
        pytest.param("evaluate", 19, id="a poll in such an evaluation, behind the scheduler's step"),
        pytest.param("evaluate first", 13, id="a poll in an evaluation before the training of an epoch"),
        pytest.param("evaluate first", 17, id="a step behind an evaluation"),
        pytest.param("two loaders", 18, id="a step in the second of two training loops"),
        pytest.param("two loaders", 16, id="the last step of the first of two training loops"),
        pytest.param("accumulate", 14, id="a poll between a batch and its step"),
        pytest.param("break", 15, id="a poll in the evaluation behind a break"),
        pytest.param("plain", 21, id="the poll behind the last epoch but one's end"),
    ],
)
def test_a_stop_leaves_no_trace_in_the_result(shapes, shape, place):
    assert shapes.run(shape, str(place), stop=place) == REQUEUED
    shapes.assert_as_if_undisturbed(shape, str(place))


def test_a_stop_in_a_warm_up_of_a_later_attempt_loses_nothing(shapes):
    assert shapes.run("warm-up", "twice", stop=12) == REQUEUED
    assert shapes.run("warm-up", "twice", stop=1) == REQUEUED
    shapes.assert_as_if_undisturbed("warm-up", "twice")


def test_a_signal_behind_the_last_epoch_is_too_late_to_matter(shapes):
    assert shapes.run("plain", "late", stop=3 * 7 + 1) == DONE
    shapes.assert_as_if_undisturbed("plain", "late")
