"""What the ranks have to hold the same: a model's buffers, of which a checkpoint has rank 0's, and the order of samples.

One script on two ranks; see scripts/agreeing.py.
"""

from ast import literal_eval
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "agreeing.py"
DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "int64", "int32", "int8", "uint8", "bool")
LAYOUTS = ("dense", "transposed", "with gaps", "transposed with gaps", "last of each row", "one value", "empty")


@pytest.fixture(scope="module")
def lines(forked_ranks, tmp_path_factory):
    attempt = forked_ranks.run([SCRIPT, tmp_path_factory.mktemp("agreeing") / "run"], 2)
    assert attempt.codes == [0, 0], attempt.outputs
    return [dict(line.partition(": ")[::2] for line in output.splitlines()) for output in attempt.outputs]


def on_both(lines, case):
    return [rank.get(case) for rank in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_rank_0s_buffers_in_place_and_nothing_between_their_elements_is_touched(lines, layout):
    assert {dtype: on_both(lines, f"{layout}, {dtype}") for dtype in DTYPES} == dict.fromkeys(DTYPES, ["True True"] * 2)


def test_buffers_that_ddp_leaves_to_each_rank_are_left(lines):
    assert on_both(lines, "not broadcast") == ["[1.0, 1.0] [1.0, 1.0]", "[2.0, 2.0] [2.0, 2.0]"]
    assert on_both(lines, "ignored") == ["[1.0, 1.0] [1.0, 1.0]", "[2.0, 2.0] [1.0, 1.0]"]


@pytest.mark.parametrize("case", ["seeded by rank", "shifted on one rank", "another length", "other batches"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_sampler_that_gives_another_order_on_each_rank_is_refused_on_every_rank(lines, case, epoch):
    said = on_both(lines, f"{case}, epoch {epoch}")
    assert all("UsageError: run.loader: the sampler of loader" in line for line in said), said
    assert all("gives another order on each rank, so samples would come twice or never" in line for line in said), said


def test_one_that_does_so_in_a_later_epoch_only_is_refused_there(lines):
    assert all(line.startswith("[") for line in on_both(lines, "from the second epoch on, epoch 0"))
    assert all("gives another order on each rank" in line for line in on_both(lines, "from the second epoch on, epoch 1"))


@pytest.mark.parametrize("case", ["python", "numpy", "torch", "weighted", "generator", "batches"])
def test_a_sampler_that_draws_from_the_global_generators_or_its_own_is_shared_out(lines, case):
    epochs = [[literal_eval(line) for line in on_both(lines, f"{case}, epoch {epoch}")] for epoch in (0, 1)]
    for shares in epochs:
        assert [len(share) for share in shares] == [6, 6]
        if case != "weighted":  # with replacement
            assert sorted(shares[0] + shares[1]) == list(range(12))
    assert epochs[0] != epochs[1], "the same order in each epoch"
