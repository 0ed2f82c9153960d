"""The file that a run goes on from is read once on each node, and verified there, however many ranks load it."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)
WORLD = 3
SCRIPT = Path(__file__).parents[1] / "scripts" / "restoring.py"
# Of a node's readers beside rank 0: Python's own files.
LITTLE_BYTES = 4 * 1024 * 1024


@pytest.fixture(scope="module")
def trained(forked_ranks, tmp_path_factory):
    """Two epochs, each with a checkpoint; and what a run in one go ends with."""
    folder = tmp_path_factory.mktemp("restoring")
    for name, epochs in (("two", 2), ("whole", 3)):
        made = forked_ranks.run([SCRIPT, folder / name, epochs], WORLD)
        assert made.codes == [0] * WORLD, made.outputs
    (state,) = {re.search(r"^state (\w+)", output, re.MULTILINE)[1] for output in made.outputs}
    return folder / "two", state


class Restored:
    """What an attempt that goes on from the second epoch says."""

    def __init__(self, ranks, trained, folder, case):
        shutil.copytree(trained[0], folder)
        self.folder, self.expected = folder, trained[1]
        (self.size,) = {path.stat().st_size for path in folder.glob("checkpoints/checkpoint_epoch0001.pt")}
        self.ranks, self.case = ranks, case

    def run(self):
        self.attempt = self.ranks.run([SCRIPT, self.folder, self.case], WORLD)
        found = [re.findall(r"^read (\d+) shared (-?\d+)", output, re.MULTILINE) for output in self.attempt.outputs]
        self.read = [int(first[0][0]) for first in found if first]
        self.shared = [int(first[0][1]) for first in found if first]
        return self

    def assert_same(self):
        assert self.attempt.codes == [0] * WORLD, "\n".join(self.attempt.outputs)
        assert {re.search(r"^state (\w+)", output, re.MULTILINE)[1] for output in self.attempt.outputs} == {self.expected}


@pytest.fixture
def restore(forked_ranks, trained, tmp_path):
    return lambda case: Restored(forked_ranks, trained, tmp_path / "run", case)


def test_on_one_node_the_first_rank_reads_it_and_the_others_do_not(restore):
    made = restore("go on").run()
    made.assert_same()
    first, *others = made.read
    assert made.size < first < made.size + LITTLE_BYTES, "once: what was verified is what is loaded"
    assert max(others) < LITTLE_BYTES
    assert max(made.shared) < made.size / 4, "what was shared is gone when the training begins"


def test_on_each_of_several_nodes_one_rank_reads_it(restore):
    made = restore("nodes").run()
    made.assert_same()
    assert all(made.size < read < made.size + LITTLE_BYTES for read in made.read)


def test_a_node_that_reads_something_else_fails_the_start_on_every_rank(restore):
    made = restore("another file").run()
    assert made.attempt.codes == [1] * WORLD
    assert all("is not what rank 0 has read" in output for output in made.attempt.outputs)


def test_a_node_that_cannot_read_it_fails_the_start_on_every_rank(restore):
    made = restore("gone").run()
    assert made.attempt.codes == [1] * WORLD
    assert all("cannot be read on" in output for output in made.attempt.outputs)


@pytest.mark.parametrize("case", ["no memory", "not to be seen"])
def test_where_nothing_can_be_shared_each_rank_loads_the_file_itself(restore, case):
    restore(case).run().assert_same()


def test_a_damaged_one_is_set_aside_and_the_one_before_is_read(restore):
    made = restore("go on")
    path = made.folder / "checkpoints" / "checkpoint_epoch0001.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    made.run()
    made.assert_same()
    first, *others = made.read
    assert first < 2 * made.size + LITTLE_BYTES
    assert max(others) < LITTLE_BYTES
    assert (made.folder / "checkpoints" / "damaged" / path.name).exists()
    events = [json.loads(line) for line in (made.folder / "events.jsonl").read_text().splitlines()]
    assert next(event for event in reversed(events) if event["event"] == "restored")["file"] == "checkpoint_epoch0000.pt"
