"""Random number generators: what is saved is plain, and what is drawn next is the same."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.state.rng import derive_seed, rng_state, seed_all, set_rng_state


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DRAWS = {
    "python": lambda: [random.random() for _ in range(3)],
    "python-gauss": lambda: [random.gauss(0, 1) for _ in range(3)],
    "numpy": lambda: np.random.rand(3).tolist(),  # noqa: NPY002 - the global generator is the one that is saved
    "numpy-gauss": lambda: np.random.randn(3).tolist(),  # noqa: NPY002
    "numpy-integers": lambda: np.random.randint(0, 2**31, 3).tolist(),  # noqa: NPY002
    "torch": lambda: torch.rand(3).tolist(),
    "torch-normal": lambda: torch.randn(17).tolist(),
    "torch-permutation": lambda: torch.randperm(50).tolist(),
}


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345], ids=["0", "1", "63 bits"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_after_a_restore_is_what_would_have_been_drawn(draw, seed):
    seed_all(seed)
    draw()  # an odd number of gaussians leaves one cached
    state = through_a_file(rng_state())
    expected = [draw(), draw()]
    seed_all(seed + 1)
    assert draw() != expected[0]
    set_rng_state(state)
    assert [draw(), draw()] == expected


def test_taking_the_state_draws_nothing():
    for draw in DRAWS.values():
        seed_all(3)
        expected = draw()
        seed_all(3)
        rng_state()
        assert draw() == expected


def test_a_state_does_not_change_with_the_generators():
    seed_all(3)
    state = rng_state()
    expected = {name: draw() for name, draw in DRAWS.items()}
    set_rng_state(state)
    assert {name: draw() for name, draw in DRAWS.items()} == expected


def test_seeding_makes_every_generator_the_same_again():
    seed_all(5)
    first = {name: draw() for name, draw in DRAWS.items()}
    seed_all(5)
    assert {name: draw() for name, draw in DRAWS.items()} == first
    seed_all(6)
    second = {name: draw() for name, draw in DRAWS.items()}
    assert all(second[name] != first[name] for name in DRAWS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without devices")
def test_a_state_that_was_saved_with_devices_is_restored_without_them():
    seed_all(3)
    state = rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)]}
    expected = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


SAVES_WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # as where it is not installed
import torch
del sys.modules["numpy"]
from hpcckpt.state.rng import rng_state, seed_all, set_rng_state
seed_all(1)
state = rng_state()
set_rng_state(state)
assert "numpy" not in sys.modules, "imported"
print(sorted(state))
"""


def test_numpy_is_in_the_state_only_where_it_is_imported():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SAVES_WITHOUT_NUMPY], capture_output=True, text=True, check=True)
    assert done.stdout == "['python', 'torch']\n"
    assert "numpy" in rng_state()


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((), 8203414616412130826),
        ((0, "rank", 0), 2233380448375218625),
        ((0, "rank", 1), 2407398572922817943),
        ((1234, "order", 0, 7), 3026031603230253728),
    ],
    ids=str,
)
def test_a_derived_seed_is_the_same_on_every_machine_for_ever(parts, seed):
    assert derive_seed(*parts) == seed


@settings(deadline=None)
@given(st.lists(st.integers() | st.text()))
def test_a_derived_seed_has_63_bits_and_every_generator_takes_it(parts):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_parts_do_not_run_together():
    assert derive_seed("1", "23") != derive_seed("12", "3")
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("order", 1) != derive_seed(1, "order")


def test_ranks_epochs_and_purposes_all_get_seeds_of_their_own():
    keys = [(seed, what, number, epoch) for seed in range(3) for what in ("order", "workers") for number in range(5) for epoch in range(30)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
