"""Names of files: one spelling for each checkpoint, and nothing else is taken for one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.layout import TEMPORARY_PREFIX, RunLayout, checkpoint_name, manifest_name, parse_checkpoint_name

EPOCHS = st.integers(0, 10**7)
STEPS = st.none() | st.integers(0, 10**13)


@given(EPOCHS, STEPS)
def test_a_checkpoints_name_is_read_back(epoch: int, step: int | None) -> None:
    assert parse_checkpoint_name(checkpoint_name(epoch, step)) == (epoch, step)


@given(st.text())
def test_whatever_is_read_is_the_one_spelling(name: str) -> None:
    parsed = parse_checkpoint_name(name)
    assert parsed is None or checkpoint_name(*parsed) == name


@given(st.integers(0, 9999), st.none() | st.integers(0, 10**9 - 1), st.integers(0, 9999), st.none() | st.integers(0, 10**9 - 1))
def test_different_places_have_different_names(epoch: int, step: int | None, epoch2: int, step2: int | None) -> None:
    assert (checkpoint_name(epoch, step) == checkpoint_name(epoch2, step2)) == ((epoch, step) == (epoch2, step2))


def test_names_are_those_of_the_contract() -> None:
    assert checkpoint_name(7) == "checkpoint_epoch0007.pt"
    assert checkpoint_name(7, 1234) == "checkpoint_epoch0007_step000001234.pt"
    assert manifest_name("checkpoint_epoch0007.pt") == "checkpoint_epoch0007.json"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("checkpoint_epoch00007.pt", id="more zeros than needed"),
        pytest.param("checkpoint_epoch007.pt", id="fewer digits"),
        pytest.param("checkpoint_epoch0007_step0000001234.pt", id="more zeros in the step"),
        pytest.param("checkpoint_epoch0007_step1234.pt", id="fewer digits in the step"),
        pytest.param("checkpoint_epoch0007.pt\n", id="newline behind"),
        pytest.param("\ncheckpoint_epoch0007.pt", id="newline before"),
        pytest.param("checkpoint_epoch\u0660\u0660\u0660\u0667.pt", id="arabic digits"),
        pytest.param("checkpoint_epoch\uff10\uff10\uff10\uff17.pt", id="full-width digits"),
        pytest.param("checkpoint_epoch-007.pt", id="negative"),
        pytest.param("checkpoint_epoch+007.pt", id="signed"),
        pytest.param("checkpoint_epoch0_07.pt", id="underscore in a number"),
        pytest.param("../checkpoint_epoch0007.pt", id="parent folder"),
        pytest.param("/checkpoint_epoch0007.pt", id="absolute"),
        pytest.param("superseded/checkpoint_epoch0007.pt", id="subfolder"),
        pytest.param("checkpoint_epoch0007.pt/", id="slash behind"),
        pytest.param("checkpoint_epoch0007.pt\x00", id="NUL"),
        pytest.param(f"{TEMPORARY_PREFIX}checkpoint_epoch0007.pt", id="unfinished"),
        pytest.param(f"{TEMPORARY_PREFIX}checkpoint_epoch0007.pt.0a1b2c3d", id="unfinished with a suffix"),
        pytest.param("checkpoint_epoch0007.pt.1", id="superseded twice"),
        pytest.param("checkpoint_epoch0007.json", id="manifest"),
        pytest.param("checkpoint_epoch0007xpt", id="no dot"),
        pytest.param("Checkpoint_epoch0007.pt", id="capital"),
        pytest.param("best_model.pt", id="the best one"),
        pytest.param("", id="empty"),
    ],
)
def test_a_look_alike_is_no_checkpoint(name: str) -> None:
    assert parse_checkpoint_name(name) is None


def test_everything_of_a_run_is_in_its_directory_and_nothing_twice() -> None:
    root = Path("/runs/x")
    paths = [getattr(RunLayout(root), name) for name, value in vars(RunLayout).items() if isinstance(value, property)]
    assert len(set(paths)) == len(paths) > 5
    assert all(path.is_relative_to(root) and path != root for path in paths)


def test_no_other_file_of_the_checkpoint_folder_is_taken_for_a_checkpoint() -> None:
    layout = RunLayout(Path("/runs/x"))
    for path in (layout.latest, layout.lock, layout.generation, layout.best, layout.superseded):
        assert path.parent == layout.checkpoints
        assert parse_checkpoint_name(path.name) is None
