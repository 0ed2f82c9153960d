"""The table: who saved a file and who loads it does not matter. Real ranks; model, AdamW's state and one step more, bit for bit."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "portability.py")
pytestmark = pytest.mark.timeout(400)

WORLDS = (1, 2, 4)
WRAPPERS = (
    *("plain", "DataParallel", "DDP", "compile", "DDP of compile", "compile of DDP", "compiled submodule"),
    *("FSDP2", "compile of FSDP2", "FSDP2 below a plain root"),
)
# 13 of the model (two are tied), and of 7 trained parameters each a step, two moments and for 4 of them amsgrad's third.
TENSORS = 38


def run(ranks, world_size, *arguments):
    attempt = ranks.run([SCRIPT, *map(str, arguments)], world_size)
    assert attempt.codes == [0] * world_size, attempt.outputs


def table(folder):
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def saved(module_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("portability")
    for world_size in WORLDS:
        run(module_ranks, world_size, "save", folder)
    assert sorted(path.stem for path in folder.glob("*.pt")) == sorted(f"{size} {wrapper}" for size in WORLDS for wrapper in WRAPPERS)
    return folder


@pytest.fixture(scope="module")
def cells(module_ranks, saved):
    for world_size in WORLDS:
        run(module_ranks, world_size, "load", saved)
    return table(saved)


def test_every_pair_of_wrappers_and_worlds_was_tried_once(cells):
    full = {(size, wrapper) for size in WORLDS for wrapper in WRAPPERS[:8]}
    further = {(2, wrapper) for wrapper in WRAPPERS}
    saved_by = {(size, wrapper) for size in WORLDS for wrapper in WRAPPERS}
    wanted = {(*saver, *loader) for saver in full for loader in full} | {(*saver, *loader) for saver in saved_by for loader in further}
    tried = Counter((*cell["saved"], *cell["loaded"]) for cell in cells)
    assert set(tried) == wanted
    assert set(tried.values()) == {1}
    assert len(cells) == 24 * 24 + 6 * 8 + 30 * 2


@pytest.mark.parametrize("what", ["model", "optimizer", "step"])
def test_what_was_loaded_is_what_was_saved_bit_for_bit(cells, what):
    """`step`: one more step of the loader leads to the weights that a plain process gets from the file with torch alone."""
    assert {cell["tensors"] for cell in cells} == {TENSORS}
    assert [cell for cell in cells if cell[what] is not True] == []


def test_a_change_in_one_number_shows_in_every_cell(ranks, saved, tmp_path):
    shutil.copy(saved / "2 FSDP2.pt", tmp_path)
    run(ranks, 2, "load", tmp_path, "weight", "moment")
    cells = table(tmp_path)
    assert sorted((cell["spoiled"], cell["loaded"][1]) for cell in cells) == sorted(itertools.product(("moment", "weight"), WRAPPERS))
    for cell in cells:
        shows_in = {"weight": {"model", "step"}, "moment": {"optimizer", "step"}}[cell["spoiled"]]
        assert {key for key in ("model", "optimizer", "step") if not cell[key]} == shows_in, cell


def test_every_form_of_sharding_goes_on_with_the_same_bits_and_is_read_without(ranks, tmp_path):
    attempt = ranks.run([SCRIPT, "sharded", str(tmp_path)], 4)
    assert attempt.codes == [0] * 4, attempt.outputs
    for output in attempt.outputs:
        said = output.splitlines()
        for form in ("two dimensions", "hybrid", "SGD", "NAdam", "state of another shape"):
            assert f"{form} True" in said, output
        # What rank 0 alone finds wrong keeps nobody waiting.
        assert "error odd.a holds a builtins.set {} {} {}" in said, output
