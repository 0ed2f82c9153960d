"""Files that several ranks write together: the bytes are those of one who writes alone, and what happens to one happens to all."""

import json
import re
import socket
from pathlib import Path

import pytest
import torch

from support.digests import digest_of
from support.runs import Runs

pytestmark = pytest.mark.timeout(300)

BLOCK = 16 * 1024 * 1024
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def runs(forked_ranks, tmp_path_factory, same_state):
    return Runs(forked_ranks, Path(__file__).parents[1] / "scripts" / "writers.py", tmp_path_factory.mktemp("writers"), same_state)


class Case:
    """One run of one attempt: three saves or four."""

    def __init__(self, runs, folder, world, case, rank, *overrides):
        self.folder, self.world = folder, world
        arguments = ["checkpoint.writers=all", *overrides]
        self.attempt = runs.ranks.run([runs.script, self.folder, case, rank, *arguments], world)
        self.text = "\n".join(self.attempt.outputs)

    def events(self, *kinds):
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] in kinds]

    def notes(self):
        return [event["text"] for event in self.events("note")]

    def saved(self):
        return [event["step"] for event in self.events("saved")]

    def heard(self):
        """What each rank heard of the third save: the error's class and message, but for the host."""
        found = [re.findall(r"^heard 3 in (\d+) s (.*)", output, re.MULTILINE) for output in self.attempt.outputs]
        assert all(int(seconds) < 30 for lines in found for seconds, _ in lines), found
        return [lines[0][1].replace(f" on {HOST}", " on HOST") if lines else None for lines in found]

    def shares(self):
        """How many shares each rank wrote."""
        return [len(re.findall("^filled Share", output, re.MULTILINE)) for output in self.attempt.outputs]

    def assert_whole(self):
        """Each file that is there has the bytes that rank 0 alone would have written, and its manifest tells their digest."""
        files = sorted((self.folder / "checkpoints").glob("checkpoint_*.pt"))
        assert files
        for file in files:
            data = file.read_bytes()
            assert len(data) > 4 * BLOCK
            alone = file.with_name(f"{file.name}.ALONE")
            assert data == alone.read_bytes() if alone.exists() else max(self.shares()) == 0
            assert json.loads(file.with_suffix(".json").read_text())["digest"] == digest_of(data)
            torch.load(file, weights_only=True)
        assert not [path for path in (self.folder / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.fixture
def play(runs, request):
    return lambda world, case="none", rank=-1, *overrides: Case(runs, runs.folder / request.node.name, world, case, rank, *overrides)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("beside", ["true", "false"])
def test_the_file_is_what_rank_0_alone_would_have_written(play, world, beside):
    made = play(world, "none", -1, f"checkpoint.async_save={beside}")
    assert made.attempt.codes == [0] * world, made.text
    assert made.saved() == [1, 2, 3, 4, 4]
    assert made.shares() == ([0] if world == 1 else [5] * world)
    if world > 1:
        assert not any("stall_s" in event for event in made.events("saved")), "the training waits for it"
        assert not made.notes()
    made.assert_whole()


def test_one_rank_of_each_node_writes_if_that_is_wanted(play):
    made = play(4, "two nodes", -1, "checkpoint.writers=node_leaders")
    assert made.attempt.codes == [0] * 4, made.text
    assert made.shares() == [5, 0, 5, 0]
    made.assert_whole()


def test_on_one_node_its_leader_is_rank_0_who_writes_as_it_does_alone(play):
    made = play(2, "none", -1, "checkpoint.writers=node_leaders")
    assert made.attempt.codes == [0, 0], made.text
    assert made.shares() == [0, 0]
    made.assert_whole()


def test_a_run_goes_on_from_such_a_file(runs, play):
    made = play(2, "full", 1)
    assert made.attempt.codes == [1, 1], made.text
    again = Case(runs, made.folder, 2, "none", -1)
    assert again.attempt.codes == [0, 0], again.text
    assert again.saved() == [1, 2, 3, 4, 4]
    again.assert_whole()


FAILURES = {
    "full": "CheckpointSaveError: {path}: the checkpoint could not be written ({who}No space left on device); the ones before it",
    "bug": "{failed}ValueError: a bug",
    "memory": "{failed}MemoryError: no memory",
}


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (1, 4)])
@pytest.mark.parametrize("case", FAILURES)
def test_what_one_writer_fails_of_all_ranks_fail_of(play, case, rank, world):
    made = play(world, case, rank)
    assert made.attempt.codes == [1] * world, made.text
    path = made.folder / "checkpoints" / "checkpoint_epoch0000_step000000003.pt"
    failed = f"RankFailedError: rank {rank} on HOST failed: " if rank else ""
    expected = FAILURES[case].format(path=path, who=f"rank {rank} on HOST: " if rank else "", failed=failed)
    assert all(heard.startswith(expected) for heard in made.heard()), made.heard()
    assert made.saved() == [1, 2]
    made.assert_whole()


def test_a_state_that_cannot_be_had_on_one_rank_fails_on_all(play):
    made = play(2, "no state", 1)
    assert made.attempt.codes == [1, 1], made.text
    assert all("KeyError: 'no state'" in heard for heard in made.heard()), made.heard()
    assert made.saved() == [1, 2]
    made.assert_whole()


@pytest.mark.parametrize(("case", "expected"), [("fenced", "FencedError"), ("no plan", "CheckpointSaveError")])
def test_what_rank_0_meets_before_anybody_writes_reaches_all(play, case, expected):
    made = play(2, case, 0)
    assert made.attempt.codes == [1, 1], made.text
    assert all(heard.startswith(expected) for heard in made.heard()), made.heard()
    assert made.saved() == [1, 2]
    made.assert_whole()


@pytest.mark.parametrize("rank", [0, 2])
def test_where_a_disk_is_full_room_is_made_and_all_write_again(play, rank):
    made = play(3, "full once", rank)
    assert made.attempt.codes == [0] * 3, made.text
    assert made.saved() == [1, 2, 3, 4, 4]
    assert made.shares() == [6] * 3
    made.assert_whole()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_where_a_writer_is_killed_nobody_waits_for_ever(play, rank):
    made = play(4, "killed", rank)
    assert made.attempt.codes[rank] == -9
    assert all(code not in (0, None) for code in made.attempt.codes), made.text
    assert made.saved() == [1, 2]
    assert [None if other == rank else True for other in range(4)] == [heard and True for heard in made.heard()]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_replica_that_differs_leaves_no_trace_in_the_file(play, rank):
    """The byte is written by rank 1; rank 2 reads it for a CRC that it writes; rank 3 has nothing to do with it."""
    made = play(4, "differs", rank)
    assert made.attempt.codes == [0] * 4, made.text
    said = f"checkpoint.writers: the state of rank {rank} on {HOST} differs from rank 0's, which is saved; rank 0 writes its share"
    assert made.notes() == ([said] if rank < 3 else [])
    assert made.shares() == ([8] if rank < 3 else [5]) + [5] * 3, "two steps and the end of the epoch are behind it"
    made.assert_whole()


def test_a_replica_whose_tensors_have_other_sizes_does_not_write(play):
    made = play(2, "sizes", 1)
    assert made.attempt.codes == [0, 0], made.text
    (note,) = made.notes()
    assert note.startswith(f"checkpoint.writers: the state of rank 1 on {HOST} has other tensors than rank 0's")
    assert made.shares() == [10, 0]
    made.assert_whole()


ALONE = {"uncommon": "that only torch.save writes", "many small": "are in tensors below 1 MiB", "sharded": "its state is sharded"}


@pytest.mark.parametrize(("case", "reason"), ALONE.items(), ids=ALONE)
def test_where_it_is_of_no_use_rank_0_writes_alone_and_says_so(play, case, reason):
    made = play(2, case)
    assert made.attempt.codes == [0, 0], made.text
    (note,) = made.notes()
    assert note.startswith("checkpoint.writers: rank 0 writes alone")
    assert reason in note
    assert made.shares() == [0, 0]
    assert made.saved() == [1, 2, 3, 4, 4]
