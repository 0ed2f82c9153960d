"""What a replica makes of a plan: it writes what it has, and says what it has not. On real ranks: tests/ranks/test_writers.py."""

import errno

import pytest
import torch

from hpcckpt import crew
from hpcckpt.archive import Layout, archived
from hpcckpt.crew import Crew, _Plan, _Replica
from hpcckpt.distributed import Collectives
from hpcckpt.state.pickled import pickled
from hpcckpt.store.digest import BLOCK_BYTES
from hpcckpt.store.shares import Share

MIB = 1024 * 1024


def state(number=0.0):
    return {"model": {"a": torch.full((5 * MIB,), number), "b": torch.ones(3)}, "same": torch.full((4 * MIB + 1,), 2.0)}


def saved(**more):
    """Rank 0's content: 36 MiB of state, and whatever comes behind it."""
    return {"step": 3, **state(), **more}


@pytest.fixture
def asked(tmp_path):
    """Ask a replica for a share of a file of rank 0's content; returns its answer, and whether the bytes are right."""

    def ask(content, own, share=None):
        found = pickled(content)
        large = found.large(crew._LARGE_BYTES)
        small = b"".join(bytes(record.load()) for number, record in enumerate(found) if number not in large)
        share = share or Share(0, BLOCK_BYTES)
        path = tmp_path / "a"
        path.write_bytes(b"")
        answer = _Replica(own).answer(_Plan(str(path), found.entries(), large, small, {1: share}), share)
        whole = b"".join(bytes(piece) for piece in archived(found))
        return answer, path.read_bytes()[share.first :] == whole[share.first : share.last]

    return ask


def test_it_writes_its_own_copy(asked):
    answer, is_right = asked(saved(), state)
    assert is_right
    assert len(answer.filled.leaves) == 1


def test_what_is_small_is_rank_0s(asked):
    answer, is_right = asked(saved(), lambda: {**state(), "model": {**state()["model"], "b": torch.zeros(3)}})
    assert is_right
    assert answer.lacks is None


@pytest.mark.parametrize("more", [torch.ones(9 * MIB), torch.ones(2)], ids=["large", "small"])
def test_what_only_rank_0_has_a_replica_does_not_write(asked, more):
    content = saved(more=more)
    layout = Layout(pickled(content).entries())
    assert asked(content, state)[1], "of the state it writes what it is asked for"
    answer, _ = asked(content, state, Share(BLOCK_BYTES, layout.central_at))
    assert answer.lacks == ("has other tensors than" if len(more) > 2 else None)


@pytest.mark.parametrize(
    "own",
    [lambda: {"model": {"a": torch.ones(5 * MIB + 1)}}, dict, lambda: {**state(), "odd": torch.eye(2).to_sparse()}],
    ids=["other sizes", "nothing", "of another kind"],
)
def test_one_with_other_tensors_writes_nothing(asked, own):
    answer, _ = asked(saved(), own)
    assert answer.lacks == "has other tensors than"
    assert answer.filled is None


def fail(error):
    raise error


def test_whatever_it_meets_becomes_its_answer(asked):
    answer, _ = asked(saved(), lambda: fail(OSError(errno.EIO, "Input/output error")))
    assert answer.failure == (errno.EIO, "Input/output error")
    answer, _ = asked(saved(), lambda: fail(OSError("without a number")))
    assert answer.failure == (None, "without a number")
    answer, _ = asked(saved(), lambda: fail(MemoryError("none left")))
    assert answer.error == "MemoryError: none left"


def test_a_rank_without_a_share_has_nothing_to_answer():
    assert _Replica(lambda: fail(AssertionError("asked for its state"))).answer(_Plan("a", [], [], b"", {}), None) is None


@pytest.mark.parametrize("wanted", ["rank0", "node_leaders", "all"])
def test_one_rank_is_no_crew(wanted):
    assert Crew.formed(Collectives(0, 1, None), wanted, 0, print) is None
