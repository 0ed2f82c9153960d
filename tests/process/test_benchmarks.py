"""The benchmarks run, on states that take no time."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(module, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What all programs have printed and kept; each compares what it has saved or loaded, and fails where that is another state."""
    folder = tmp_path_factory.mktemp("benchmarks")
    figures = folder / "figures.json"
    programs = ("saves", "stall", "restore", "growth")
    quick = ("--quick", "--state", "tiny", "--rounds", "1", "--settle-s", "0")
    printed = run("benchmarks.checkpoints", *programs, *quick, "--folder", folder, "--json", figures)
    assert [path.name for path in folder.iterdir()] == ["figures.json"]
    return figures, printed


def cases(measured, section):
    return json.loads(measured[0].read_text())["sections"][section]


def test_every_contender_saves_a_state_that_is_read_back(measured):
    found = cases(measured, "saves")["tiny"]["contenders"]
    assert len(found) >= 10
    assert all(len(rounds["wall_s"]) == 1 for rounds in found.values())
    assert all(f"| {name} |" in measured[1] for name in found)


def test_every_way_of_saving_beside_the_training_saves_the_state_at_the_call(measured):
    found = cases(measured, "stall")["tiny"]["contenders"]
    assert len(found) >= 10
    assert all(rounds["durable_s"][0] > 0 for name, rounds in found.items() if name not in ("no save", "one copy in memory"))


def test_every_way_of_loading_brings_the_state_to_life_on_one_process_and_on_several(measured):
    found = cases(measured, "restore")
    assert list(found) == ["tiny, 1, cold", "tiny, 1, warm", "tiny, 2, cold"]
    assert all(len(case["contenders"]) >= 8 for case in found.values())


def test_saves_grow_with_bytes_tensors_and_ranks(measured):
    assert list(cases(measured, "growth")) == ["1000 x 1 KB", "10000 x 1 KB", "1 rank", "2 ranks"]


def test_starts_and_stops_are_measured_and_no_command_of_a_login_node_imports_torch(tmp_path):
    figures = tmp_path / "figures.json"
    run("benchmarks.startstop", "--quick", "--rounds", "1", "--json", figures)
    found = cases([figures], "start and stop")
    assert list(found) == ["start", "commands", "stop"]
    assert {rounds["imports_torch"][0] for rounds in found["commands"]["contenders"].values()} == {0}
    assert found["stop"]["contenders"]["hpcckpt, async_save: true"]["save_s"][0] > 0


def test_figures_become_pictures_and_tables_always_the_same(measured, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("Before\n<!-- table: stall tiny -->\nold\n<!-- end -->\n![saves](saves-tiny.svg)\n")
    texts = []
    for _ in range(2):
        run("benchmarks.pictures", measured[0], tmp_path, "--document", document)
        texts.append((document.read_text(), (tmp_path / "saves-tiny.svg").read_text()))
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("Before\n<!-- table: stall tiny -->\n|  |")
    assert "old" not in texts[0][0]
    assert ET.fromstring(texts[0][1]).tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "saves-tiny.svg"}


def test_a_table_without_figures_is_named_and_the_document_stays(measured, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("<!-- table: stall other -->\nold\n<!-- end -->\n")
    command = [sys.executable, "-m", "benchmarks.pictures", measured[0], "--document", document]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "stall other" in done.stderr
    assert "old" in document.read_text()


def test_two_writers_who_are_held_to_a_rate_are_faster_than_one(tmp_path):
    printed = run("benchmarks.writers", "--quick", "--folder", tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["writers", "1", "2"]
    assert float(rows[2][3]) > 1.2, printed
    assert not list(tmp_path.iterdir())
