"""What a run gives to be looked at: metrics.jsonl, a line of progress now and then, and curves that cannot stop it."""

import os
import re

import pytest
import torch

from hpcckpt import recorder as module
from hpcckpt.errors import UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.recorder import Recorder
from hpcckpt.store.ledger import read_lines


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


@pytest.fixture
def recorder(layout):
    new = Recorder(layout, "digits")
    new.begin(0, 0)
    return new


class Drawn:
    """A curve that notes what it is given, and fails when it is told to."""

    name = "Drawn"

    def __init__(self):
        self.handle, self.had, self.lines, self.closed, self.failure = object(), None, [], [], None

    def go_on(self, lines, step):
        self.had = (lines, step)

    def add(self, lines, step):
        if self.failure is not None:
            raise self.failure
        self.lines.append((lines, step))

    def close(self, step, *, finished):
        self.closed.append((step, finished))


@pytest.fixture
def drawn(monkeypatch):
    curve = Drawn()
    monkeypatch.setattr(module, "TensorBoard", lambda *_: curve)
    return curve


def test_a_log_belongs_to_the_step_in_progress_and_a_report_to_those_done(recorder, layout):
    recorder.log(0, 0, {"loss": 0.5})
    recorder.report(0, 1, {"val": 0.25})
    assert not layout.metrics.exists()
    recorder.flush(0, 1)
    assert read_lines(layout.metrics) == [
        {"kind": "log", "epoch": 0, "step": 1, "loss": 0.5},
        {"kind": "report", "epoch": 0, "step": 1, "val": 0.25},
    ]


def test_values_are_those_of_the_call_and_not_waited_for_in_it(recorder, layout, monkeypatch):
    running = torch.tensor(1.0, requires_grad=True)
    with monkeypatch.context() as waiting, torch.no_grad():
        for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
            waiting.setattr(torch.Tensor, name, None)
        recorder.log(0, 0, {"loss": running})
        running += 1  # a sum that goes on
    recorder.flush(0, 1)
    assert read_lines(layout.metrics)[0]["loss"] == 1.0


def test_beginning_cuts_back_what_lies_behind_the_position(recorder, layout):
    for done in range(4):
        recorder.log(0, done, {"loss": done})
    recorder.flush(0, 4)
    Recorder(layout, "digits").begin(0, 2)
    assert [line["step"] for line in read_lines(layout.metrics)] == [1, 2]


def test_a_file_that_cannot_be_cut_back_is_said_and_does_not_stop_the_run(recorder, layout, capsys, monkeypatch):
    recorder.log(0, 0, {"loss": 1})
    recorder.flush(0, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    Recorder(layout, "digits").begin(0, 0)
    assert "metrics.jsonl: could not be cut back (No space left on device)" in capsys.readouterr().out


def test_a_flush_prints_one_line_if_there_was_anything(recorder, capsys):
    recorder.start(3)
    recorder.flush(0, 0)
    assert capsys.readouterr().out == ""
    recorder.log(0, 0, {"loss": 0.5})
    recorder.log(0, 1, {"loss": 0.25})
    recorder.flush(0, 2)
    assert capsys.readouterr().out == "hpcckpt: epoch 0 of 0..2  step 2  loss 0.25\n"
    recorder.flush(0, 2)
    recorder.log(0, 2, {"loss": 0.125})
    recorder.flush(0, 3)
    assert re.fullmatch(r"hpcckpt: epoch 0 of 0..2  step 3  loss 0.125  [\d.]+ steps/s\n", capsys.readouterr().out)


def test_before_the_number_of_epochs_is_known_a_line_does_without(recorder, capsys):
    recorder.log(0, 0, {"loss": 0.5})
    recorder.flush(0, 1)
    assert capsys.readouterr().out == "hpcckpt: epoch 0  step 1  loss 0.5\n"


def test_a_line_is_due_some_seconds_behind_the_last_one(recorder, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert recorder.is_due
    recorder.flush(0, 0)
    assert not recorder.is_due
    now += module.INTERVAL_S - 0.01
    assert not recorder.is_due
    now += 0.01
    assert recorder.is_due


def test_a_curve_gets_what_is_there_and_then_what_comes(recorder, drawn):
    recorder.log(0, 0, {"loss": 1})
    recorder.flush(0, 1)
    recorder.log(0, 1, {"loss": 2})
    assert recorder.tensorboard() is drawn.handle
    assert drawn.had == ([{"kind": "log", "epoch": 0, "step": 1, "loss": 1}], 1)
    recorder.flush(0, 2)
    recorder.flush(0, 2)  # the user's own points are to be written, too
    assert drawn.lines == [([{"kind": "log", "epoch": 0, "step": 2, "loss": 2}], 2), ([], 2)]


def test_closing_writes_what_is_left_and_is_harmless_twice(recorder, drawn, layout):
    recorder.tensorboard()
    recorder.log(0, 6, {"loss": 2})
    recorder.close(finished=False)
    recorder.close()
    assert [line["step"] for line in read_lines(layout.metrics)] == [7]
    assert (len(drawn.lines), drawn.closed) == (1, [(6, False)])


@pytest.mark.parametrize("method", ["tensorboard", "wandb"])
def test_a_curve_before_the_position_is_known_is_refused(layout, method):
    with pytest.raises(UsageError, match="not known yet"):
        getattr(Recorder(layout, "digits"), method)()


@pytest.mark.usefixtures("drawn")
def test_a_second_curve_of_a_kind_is_refused(recorder):
    recorder.tensorboard()
    with pytest.raises(UsageError, match="attached already"):
        recorder.tensorboard()


def test_a_curve_that_fails_is_said_once_and_left_alone(recorder, drawn, layout, capsys):
    recorder.tensorboard()
    drawn.failure = RuntimeError("broken")
    for done in range(3):
        recorder.log(0, done, {"loss": 0.5})
        recorder.flush(0, done + 1)
    recorder.close()
    assert capsys.readouterr().out.count("hpcckpt: note: Drawn: RuntimeError: broken; this curve ends here") == 1
    assert drawn.closed == []
    assert [line["step"] for line in read_lines(layout.metrics)] == [1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes_through_a_curve(recorder, drawn, error):
    recorder.tensorboard()
    drawn.failure = error()
    with pytest.raises(error):
        recorder.flush(0, 0)


def test_a_durable_flush_is_on_the_disk(recorder, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    recorder.log(0, 0, {"loss": 0.5})
    recorder.flush(0, 1)
    assert synced == []
    recorder.flush(0, 1, durable=True)
    assert len(synced) == 1
