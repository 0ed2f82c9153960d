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
    assert metrics.flush() == [{"kind": "log", "epoch": 0, "step": 1, "loss": 0.5}]
    assert read_lines(path) == [{"kind": "log", "epoch": 0, "step": 1, "loss": 0.5}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_flush_appends_all_that_is_pending_once_and_returns_it(path):
    metrics = MetricsFile(path)
    assert metrics.flush() == []
    for step in range(1, 4):
        metrics.add("log", 0, step, {"loss": step})
    assert [line["step"] for line in metrics.flush()] == [1, 2, 3]
    assert metrics.flush() == []
    metrics.add("report", 0, 3, {"val_loss": 1.0})
    metrics.flush()
    assert [(line["kind"], line["step"]) for line in read_lines(path)] == [("log", 1), ("log", 2), ("log", 3), ("report", 3)]


@pytest.fixture
def synced(monkeypatch):
    """Return the sizes that files had when they were synced."""
    sizes, fsync = [], os.fsync

    def noting(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return sizes


def test_a_durable_flush_makes_what_an_earlier_one_appended_durable_too(path, synced):
    metrics = MetricsFile(path)
    metrics.flush(durable=True)
    assert not path.exists()
    metrics.add("log", 0, 1, {"loss": 0.5})
    metrics.flush()
    assert synced == []
    metrics.flush(durable=True)
    assert synced == [path.stat().st_size]
    metrics.flush(durable=True)
    assert len(synced) == 1


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
    "complex": (torch.tensor(1j), "1j"),
    "date": (np.datetime64("2020-01-02"), "2020-01-02"),
}


@pytest.mark.parametrize(("value", "plain"), VALUES.values(), ids=VALUES)
def test_a_value_becomes_a_number(path, value, plain):
    metrics = MetricsFile(path)
    metrics.add("log", 0, 1, {"value": value})
    assert metrics.flush()[0]["value"] == plain
    line = read_lines(path)[0]["value"]
    assert (line, type(line)) == (plain, type(plain))


def test_a_tensor_is_read_at_the_flush_and_not_waited_for_before(path):
    metrics, loss = MetricsFile(path), torch.tensor(1.0)
    metrics.add("log", 0, 1, {"loss": loss})
    loss.fill_(2.0)
    assert metrics.flush()[0]["loss"] == 2.0


def test_a_metric_of_a_reserved_name_does_not_hide_the_position(path):
    metrics = MetricsFile(path)
    metrics.add("log", 3, 40, {"step": 1, "epoch": 99, "kind": "report", "loss": 0.5})
    metrics.flush()
    assert read_lines(path) == [{"kind": "log", "epoch": 3, "step": 40, "loss": 0.5}]


def filled(path):
    """Return a file of three epochs of two steps each: a report before the second step, a log and a report behind it."""
    metrics = MetricsFile(path)
    for epoch in range(3):
        done = 2 * epoch
        metrics.add("log", epoch, done + 1, {"loss": 0.0})
        metrics.add("report", epoch, done + 1, {"early": 0.0})
        metrics.add("log", epoch, done + 2, {"loss": 0.0})
        metrics.add("log", epoch, done + 3, {"evaluated": 0.0})
        metrics.add("report", epoch, done + 2, {"val": 0.0})
    metrics.flush()
    return metrics


CUTS = {
    "to the beginning": ((0, 0), 0, []),
    "to the end": ((3, 6), 15, []),
    "beyond the end": ((9, 99), 15, []),
    "to the end of an epoch": ((2, 4), 10, []),
    "behind the first step of an epoch": ((1, 3), 5, [("log", 1, 3)]),
    "behind the last step of an epoch": ((1, 4), 5, [("log", 1, 3), ("report", 1, 3), ("log", 1, 4)]),
    "before the first step of an epoch": ((1, 2), 5, []),
}


@pytest.mark.parametrize(("position", "whole", "more"), CUTS.values(), ids=CUTS)
def test_cutting_back_keeps_finished_epochs_and_what_lies_before_the_position(path, position, whole, more):
    metrics = filled(path)
    before = read_lines(path)
    gone = metrics.cut_back(*position)
    lines = read_lines(path)
    assert lines[:whole] == before[:whole]
    assert [(line["kind"], line["epoch"], line["step"]) for line in lines[whole:]] == more
    assert gone == 15 - len(lines)


def test_cutting_back_drops_what_is_pending(path):
    metrics = filled(path)
    metrics.add("log", 3, 7, {"loss": 0.0})
    assert metrics.cut_back(3, 6) == 0
    assert metrics.flush() == []


def test_cutting_back_no_file_is_nothing(path):
    assert MetricsFile(path).cut_back(3, 1) == 0
    assert not path.exists()


def test_nothing_to_cut_leaves_the_file_untouched(path):
    metrics = filled(path)
    before = path.stat()
    metrics.cut_back(3, 6)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_cut_that_cannot_be_written_leaves_the_file_as_it_was(path, monkeypatch):
    metrics, before = filled(path), path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        metrics.cut_back(0, 0)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


FOREIGN = [
    '{"note": "by hand"}',
    '{"kind": "log", "epoch": "1", "step": 2}',
    '{"kind": "log", "epoch": true, "step": 2}',
    '{"kind": "report", "epoch": 9, "step": NaN}',
    '{"kind": "report", "epoch": 9, "step": 1.5}',
    '{"kind": "log", "epoch": 9, "step": -1}',
    '{"kind": "log", "epoch": ' + "9" * 400 + ', "step": 1}',
    '{"kind": "log", "epoch": null, "step": [1]}',
]
DAMAGED = ['{"kind": "log", "epo', "7", "[1]", "null", "[" * 100_000, "9" * 5000, "\x00\x00", '{"step": 1}}']


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_an_object_without_a_place_is_somebody_elses_and_stays(path, line):
    metrics = filled(path)
    path.write_text(f"{line}\n{path.read_text()}{line}\n")
    assert metrics.cut_back(0, 0) == 15
    assert path.read_text() == f"{line}\n" * 2
    assert metrics.lines() == []


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_line_that_is_no_object_goes_and_takes_no_other_with_it(path, line):
    metrics = filled(path)
    before = path.read_text()
    path.write_text(f"{line}\n{before}{line}")
    assert len(metrics.lines()) == 15
    assert metrics.cut_back(3, 6) == 2
    assert path.read_text() == before


def test_bytes_that_are_no_text_go(path):
    metrics = filled(path)
    before = path.read_bytes()
    path.write_bytes(b'{"kind": "log", "epoch": 0, "step": 1, "x": "\xff"}\n' + before)
    assert metrics.cut_back(3, 6) == 1
    assert path.read_bytes() == before


def training(epochs):
    """Yield what a script gives and, between, the positions (epoch, step) that a checkpoint can be of.

    Each epoch is a list of steps, each of them whether an evaluation and a report come before it; an evaluation that logs and
    reports ends it.
    """
    done = 0
    for epoch, steps in enumerate(epochs):
        for number, evaluated in enumerate(steps):
            if evaluated:
                yield {"kind": "report", "epoch": epoch, "step": done, "early": number}
            yield {"kind": "log", "epoch": epoch, "step": done + 1, "loss": number}
            yield {"kind": "log", "epoch": epoch, "step": done + 1, "again": number}
            done += 1
            yield epoch, done
        yield {"kind": "log", "epoch": epoch, "step": done + 1, "evaluated": epoch}
        yield {"kind": "report", "epoch": epoch, "step": done, "val": epoch}
        yield epoch + 1, done


@settings(deadline=None, max_examples=300)
@given(
    epochs=st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=4),
    interruptions=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(0, 99), st.booleans()), max_size=6),
)
def test_the_file_is_that_of_an_uninterrupted_run_wherever_it_was_interrupted(tmp_path_factory, epochs, interruptions):
    path = tmp_path_factory.getbasetemp() / "often.jsonl"
    path.unlink(missing_ok=True)
    whole = list(training(epochs))
    # Where a checkpoint is, as the number of what comes next.
    saved, at = {0: (0, 0)}, 0
    for length, every, back, torn in [*interruptions, (len(whole), 3, 0, False)]:
        metrics = MetricsFile(path)
        metrics.cut_back(*saved[at])
        for number in range(at, min(at + length, len(whole))):
            if isinstance(whole[number], dict):
                given = dict(whole[number])
                metrics.add(given.pop("kind"), given.pop("epoch"), given.pop("step"), given)
            if isinstance(whole[number], tuple) or number % every == 0:
                metrics.flush()
            if isinstance(whole[number], tuple):
                saved[number + 1] = whole[number]
        if torn:
            with path.open("a") as file:
                file.write('{"kind": "log", "epo')
        at = sorted(saved)[-1 - back % len(saved)]
        saved = {number: position for number, position in saved.items() if number <= at}
    assert read_lines(path) == [line for line in whole if isinstance(line, dict)]


def test_a_line_that_a_crash_cut_off_takes_no_other_with_it(path):
    metrics = filled(path)
    os.truncate(path, path.stat().st_size - 5)
    metrics.add("log", 3, 7, {"loss": 0.0})
    metrics.flush()
    assert [(line["kind"], line["step"]) for line in read_lines(path)[-2:]] == [("log", 7), ("log", 7)]
    assert len(read_lines(path)) == 15


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_the_lines_and_does_not_raise():
    metrics = MetricsFile(Path("/dev/full"))
    metrics.add("log", 0, 1, {"loss": 0.5})
    assert metrics.flush()[0]["loss"] == 0.5


def test_every_line_is_json_on_its_own(path):
    filled(path)
    assert all(json.loads(line)["kind"] in ("log", "report") for line in path.read_text().splitlines())
