"""metrics.jsonl: no point is there twice, wherever a run was interrupted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.store.ledger import read_lines
from hpcckpt.store.metrics import MetricsFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_nothing_is_written_before_the_flush(path):
    metrics = MetricsFile(path)
    metrics.add("log", 0, 1, {"loss": 0.5})
    assert not path.exists()
    assert metrics.flush() == {"kind": "log", "epoch": 0, "step": 1, "loss": 0.5}
    assert read_lines(path) == [{"kind": "log", "epoch": 0, "step": 1, "loss": 0.5}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_flush_appends_all_that_is_pending_once_and_returns_the_last(path):
    metrics = MetricsFile(path)
    assert metrics.flush() == {}
    for step in range(1, 4):
        metrics.add("log", 0, step, {"loss": step})
    assert metrics.flush()["step"] == 3
    assert metrics.flush() == {}
    metrics.add("report", 0, 3, {"val_loss": 1.0})
    metrics.flush()
    assert [(line["kind"], line["step"]) for line in read_lines(path)] == [("log", 1), ("log", 2), ("log", 3), ("report", 3)]


VALUES = {
    "tensor": (torch.tensor(0.5), 0.5),
    "tensor with gradient": (torch.tensor(0.25, requires_grad=True), 0.25),
    "tensor of one element": (torch.tensor([[3]]), 3),
    "bool tensor": (torch.tensor(True), True),
    "half": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    "numpy": (np.float32(0.5), 0.5),
    "int": (7, 7),
    "text": ("warm-up", "warm-up"),
    "infinite": (float("inf"), float("inf")),
}


@pytest.mark.parametrize(("value", "plain"), VALUES.values(), ids=VALUES)
def test_a_value_becomes_a_number(path, value, plain):
    metrics = MetricsFile(path)
    metrics.add("log", 0, 1, {"value": value})
    assert metrics.flush()["value"] == plain
    line = read_lines(path)[0]["value"]
    assert (line, type(line)) == (plain, type(plain))


def test_a_tensor_is_read_at_the_flush_and_not_waited_for_before(path):
    metrics, loss = MetricsFile(path), torch.tensor(1.0)
    metrics.add("log", 0, 1, {"loss": loss})
    loss.fill_(2.0)
    assert metrics.flush()["loss"] == 2.0


def test_a_metric_of_a_reserved_name_does_not_hide_the_position(path):
    metrics = MetricsFile(path)
    metrics.add("log", 3, 40, {"step": 1, "epoch": 99, "kind": "report", "loss": 0.5})
    metrics.flush()
    assert read_lines(path) == [{"kind": "log", "epoch": 3, "step": 40, "loss": 0.5}]


def filled(path):
    """Return a file of three epochs of two steps each, a report behind each epoch."""
    metrics = MetricsFile(path)
    for epoch in range(3):
        for step in (2 * epoch + 1, 2 * epoch + 2):
            metrics.add("log", epoch, step, {"loss": 0.0})
        metrics.add("report", epoch, 2 * epoch + 2, {"val": 0.0})
    metrics.flush()
    return metrics


CUTS = {
    "to the beginning": ((0, 0), [], []),
    "to the end": ((6, 3), [1, 2, 3, 4, 5, 6], [0, 1, 2]),
    "to the end of an epoch": ((4, 2), [1, 2, 3, 4], [0, 1]),
    "within an epoch": ((3, 1), [1, 2, 3], [0]),
    "behind the last step, before the report": ((4, 1), [1, 2, 3, 4], [0]),
    "beyond the end": ((99, 9), [1, 2, 3, 4, 5, 6], [0, 1, 2]),
}


@pytest.mark.parametrize(("position", "steps", "epochs"), CUTS.values(), ids=CUTS)
def test_cutting_back_keeps_logs_by_step_and_reports_by_epoch(path, position, steps, epochs):
    gone = filled(path).cut_back(*position)
    lines = read_lines(path)
    assert [line["step"] for line in lines if line["kind"] == "log"] == steps
    assert [line["epoch"] for line in lines if line["kind"] == "report"] == epochs
    assert gone == 9 - len(steps) - len(epochs)


def test_cutting_back_drops_what_is_pending(path):
    metrics = filled(path)
    metrics.add("log", 3, 7, {"loss": 0.0})
    assert metrics.cut_back(6, 3) == 0
    assert metrics.flush() == {}


def test_cutting_back_no_file_is_nothing(path):
    assert MetricsFile(path).cut_back(3, 1) == 0
    assert not path.exists()


def test_nothing_to_cut_leaves_the_file_untouched(path):
    metrics = filled(path)
    before = path.stat()
    metrics.cut_back(6, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=6))
def test_every_step_is_there_once_however_often_it_was_interrupted(tmp_path_factory, interruptions):
    path = tmp_path_factory.getbasetemp() / "often.jsonl"
    path.unlink(missing_ok=True)
    step = 0
    for run, back in [*interruptions, (3, 0)]:
        metrics = MetricsFile(path)
        metrics.cut_back(step, 0)
        for at in range(step + 1, step + run + 1):
            metrics.add("log", 0, at, {"loss": at})
        metrics.flush()
        step = max(step + run - back, 0)
    assert [line["step"] for line in read_lines(path)] == list(range(1, step + 1))


def test_a_line_that_a_crash_cut_off_takes_no_other_with_it(path):
    metrics = filled(path)
    os.truncate(path, path.stat().st_size - 5)
    metrics.add("log", 3, 7, {"loss": 0.0})
    metrics.flush()
    assert [line["step"] for line in read_lines(path) if line["kind"] == "log"] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_the_lines_and_does_not_raise():
    metrics = MetricsFile(Path("/dev/full"))
    metrics.add("log", 0, 1, {"loss": 0.5})
    assert metrics.flush()["loss"] == 0.5


def test_every_line_is_json_on_its_own(path):
    filled(path)
    assert all(json.loads(line)["kind"] in ("log", "report") for line in path.read_text().splitlines())
