"""The checkpoint manager on several ranks: one saves, all load, and what fails on one is raised on all."""

from pathlib import Path

import pytest
import torch

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "manager.py")


def lines_of(attempt):
    assert set(attempt.codes) == {0}, attempt.outputs
    return [dict(line.partition(" ")[::2] for line in output.splitlines()) for output in attempt.outputs]


def on_all(lines, case):
    return [rank.get(case) for rank in lines]


@pytest.fixture(scope="module")
def trained(module_ranks, tmp_path_factory):
    """Three epochs at once, and three epochs in two pieces."""
    folder = tmp_path_factory.mktemp("manager")
    whole = lines_of(module_ranks.run([SCRIPT, str(folder / "whole"), "train3"], 2))
    first = lines_of(module_ranks.run([SCRIPT, str(folder / "pieces"), "train2"], 2))
    second = lines_of(module_ranks.run([SCRIPT, str(folder / "pieces"), "train3"], 2))
    return folder, whole, first, second


def test_rank_0_returns_the_path_and_the_others_none(trained):
    folder, whole, _, _ = trained
    assert on_all(whole, "path2") == [str(folder / "whole" / "checkpoint_epoch0002.pt"), "None"]


def test_training_goes_on_behind_the_newest_epoch_with_the_same_bits_and_random_numbers(trained):
    folder, whole, first, second = trained
    assert on_all(whole, "start") == on_all(first, "start") == ["0", "0"]
    assert on_all(second, "start") == ["2", "2"]
    assert on_all(second, "weights") == on_all(whole, "weights")
    assert on_all(second, "rng") == on_all(whole, "rng")
    assert whole[0]["rng"] != whole[1]["rng"]
    states = [torch.load(folder / name / "checkpoint_epoch0002.pt", weights_only=True)["model_state_dict"] for name in ("whole", "pieces")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_number_of_ranks_loads_it_and_is_told_what_differs(trained, ranks):
    folder, _, _, second = trained
    alone = ranks.run([SCRIPT, str(folder / "pieces"), "train3"], 1)
    assert alone.codes == [0]
    assert "start 3" in alone.outputs[0]
    assert f"weights {second[0]['weights']}" in alone.outputs[0]
    assert "of 2 ranks, and there are 1: they stay as they are, so the result is not bit-exact" in alone.outputs[0]


@pytest.fixture(scope="module")
def faults(module_ranks, tmp_path_factory):
    return lines_of(module_ranks.run([SCRIPT, str(tmp_path_factory.mktemp("faults") / "c"), "faults"], 3))


def test_a_full_disk_on_rank_0_is_the_same_error_on_every_rank_and_the_older_one_is_intact(faults):
    assert len(set(on_all(faults, "full"))) == 1
    assert faults[0]["full"].startswith("CheckpointSaveError: ")
    assert "File too large" in faults[0]["full"]
    assert on_all(faults, "newest") == ["0"] * 3


def test_a_missing_or_damaged_file_is_the_same_error_on_every_rank(faults):
    for case, kind in (("missing", "CheckpointNotFoundError"), ("damaged", "CheckpointCorruptError"), ("name", "UsageError")):
        assert len(set(on_all(faults, case))) == 1
        assert faults[0][case].startswith(f"{kind}: ")


def test_a_model_that_does_not_fit_on_one_rank_is_an_error_on_every_rank(faults):
    assert faults[1]["misfit"].startswith("CheckpointMismatchError: model: the checkpoint does not fit the model")
    for rank in (0, 2):
        assert faults[rank]["misfit"].startswith("RankFailedError: rank 1 failed: CheckpointMismatchError")


def test_an_object_without_state_on_some_ranks_is_an_error_on_every_rank(faults):
    assert faults[0]["tracked"].startswith("RankFailedError: rank 1 failed: UsageError: ")
    for rank in (1, 2):
        assert faults[rank]["tracked"].startswith("UsageError: ")
    assert on_all(faults, "metric") == ["UsageError: metrics: loss is a str, not a number; leave it out, or give its mean, say"] * 3


def test_numbers_that_are_not_the_process_groups_are_refused(faults):
    assert on_all(faults, "numbers") == [
        f"UsageError: rank {rank} of 4: torch.distributed says rank {rank} of 3; give its numbers" for rank in range(3)
    ]


def test_the_next_save_makes_a_damaged_directory_good_again(faults):
    assert on_all(faults, "after") == ["2"] * 3
