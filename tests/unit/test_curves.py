"""Curves are one each, with every point once, wherever a run was interrupted."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from hpcckpt import curves
from hpcckpt.errors import UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.recorder import Recorder
from hpcckpt.store.durable import write_json
from hpcckpt.store.ledger import read_lines

ALL = dict.fromkeys(("scalars", "tensors", "images", "histograms", "compressedHistograms", "audio"), 0)


class Clock:
    """The real time, but whoever sleeps does not wait."""

    def __init__(self):
        self.ahead, self.slept = 0.0, []

    def time(self):
        return time.time() + self.ahead

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.ahead += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(curves, "time", clock)
    monkeypatch.setattr(event_file_writer, "time", clock)
    return clock


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def recorder(layout, epoch=0, step=0):
    new = Recorder(layout, "digits")
    new.begin(epoch, step)
    return new


def shown(folder):
    """Return the scalars that TensorBoard shows, by tag, as (step, value)."""
    accumulator = EventAccumulator(str(folder), size_guidance=ALL)
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def shown_texts(folder):
    accumulator = PluginAccumulator(str(folder), tensor_size_guidance={}, size_guidance=ALL)
    accumulator.Reload()
    texts = {}
    for tag in accumulator.Tags()["tensors"]:
        values = [(event.step, tensor_util.make_ndarray(event.tensor_proto).flat[0]) for event in accumulator.Tensors(tag)]
        texts |= {tag: [(step, value.decode()) for step, value in values]} if isinstance(values[0][1], bytes) else {}
    return texts


def recorded(layout):
    """Return what metrics.jsonl holds in the same form; event files have single precision."""
    points = defaultdict(list)
    for line in read_lines(layout.metrics):
        for name, value in line.items():
            if name not in ("kind", "epoch", "step"):
                points[name].append((line["step"], float(np.float32(value))))
    return dict(points)


def train(attempt, epoch, first, last, value=None):
    """Log steps first…last."""
    for step in range(first, last + 1):
        attempt.log(epoch, step - 1, {"loss": step / 7 if value is None else value})


def test_tensorboard_shows_what_is_logged_and_reported(layout):
    attempt = recorder(layout)
    assert attempt.tensorboard().log_dir == str(layout.root / "tensorboard")
    train(attempt, 0, 1, 3)
    attempt.report(0, 3, {"val": 0.5})
    attempt.flush(0, 3)
    assert (
        shown(layout.tensorboard)
        == recorded(layout)
        == {
            "loss": [(1, float(np.float32(1 / 7))), (2, float(np.float32(2 / 7))), (3, float(np.float32(3 / 7)))],
            "val": [(3, 0.5)],
        }
    )
    attempt.close()


def test_values_that_are_no_plain_numbers_are_shown_as_they_are(layout):
    attempt = recorder(layout)
    attempt.tensorboard()
    odd = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "huge": 10**400, "beyond": 1e300, "yes": True, "phase": "warm-up"}
    attempt.log(0, 0, odd)
    attempt.flush(0, 1)
    scalars = shown(layout.tensorboard)
    assert math.isnan(scalars.pop("nan")[0][1])
    assert scalars == {
        "inf": [(1, math.inf)],
        "minus": [(1, -math.inf)],
        "huge": [(1, math.inf)],
        "beyond": [(1, math.inf)],
        "yes": [(1, 1.0)],
    }
    assert shown_texts(layout.tensorboard) == {"phase/text_summary": [(1, "warm-up")]}
    attempt.close()


def test_texts_behind_a_kill_are_there_once(layout):
    for end, epoch, step in ((4, 0, 0), (6, 0, 2)):
        attempt = recorder(layout, epoch, step)
        attempt.tensorboard()
        for done in range(step, end):
            attempt.log(0, done, {"phase": f"{done}"})
        attempt.flush(0, end)
    assert shown_texts(layout.tensorboard) == {"phase/text_summary": [(step, f"{step - 1}") for step in range(1, 7)]}


def test_a_kill_costs_no_point_that_was_flushed_and_leaves_none_twice(layout):
    script = f"""
import os, signal
from pathlib import Path
from hpcckpt.layout import RunLayout
from hpcckpt.recorder import Recorder
attempt = Recorder(RunLayout(Path({str(layout.root)!r})), "digits")
attempt.begin(0, 0)
writer = attempt.tensorboard()
for done in range(20):
    attempt.log(0, done, {{"loss": float(done)}})
    writer.add_scalar("own", float(done), done)
    if done in (10, 15):
        attempt.flush(0, done + 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False, cwd=layout.root)
    assert died.returncode == -signal.SIGKILL
    assert [step for step, _ in shown(layout.tensorboard)["loss"]] == list(range(1, 17))
    attempt = recorder(layout, 0, 11)  # the flush at step 11 was that of a checkpoint
    writer = attempt.tensorboard()
    for done in range(11, 14):
        attempt.log(0, done, {"loss": float(done)})
        writer.add_scalar("own", float(done), done)
    attempt.flush(0, 14)
    assert shown(layout.tensorboard) == recorded(layout) | {"own": [(done, float(done)) for done in range(14)]}
    assert [step for step, _ in shown(layout.tensorboard)["loss"]] == list(range(1, 15))
    attempt.close()


def test_a_rewind_takes_the_points_of_later_epochs_back(layout):
    attempt = recorder(layout)
    attempt.tensorboard()
    for epoch in range(4):
        train(attempt, epoch, 3 * epoch + 1, 3 * epoch + 3)
        attempt.log(epoch, 3 * epoch + 3, {"evaluated": float(epoch)})
        attempt.report(epoch, 3 * epoch + 3, {"val": float(epoch)})
        attempt.flush(epoch, 3 * epoch + 3)
    attempt.close()
    attempt = recorder(layout, 2, 6)
    attempt.tensorboard()
    assert shown(layout.tensorboard) == recorded(layout)
    assert shown(layout.tensorboard)["val"] == [(3, 0.0), (6, 1.0)]
    assert shown(layout.tensorboard)["evaluated"] == [(4, 0.0), (7, 1.0)]
    train(attempt, 2, 7, 9, value=0.25)
    attempt.close()
    assert shown(layout.tensorboard) == recorded(layout)
    assert shown(layout.tensorboard)["loss"][-3:] == [(7, 0.25), (8, 0.25), (9, 0.25)]


def test_a_curve_that_is_attached_late_has_all_points(layout):
    attempt = recorder(layout)
    train(attempt, 0, 1, 5)
    attempt.flush(0, 5)
    attempt = recorder(layout, 0, 4)
    train(attempt, 0, 5, 6)
    attempt.flush(0, 6)
    train(attempt, 0, 7, 7)
    attempt.tensorboard()
    train(attempt, 0, 8, 8)
    attempt.close()
    assert shown(layout.tensorboard) == recorded(layout)
    assert [step for step, _ in shown(layout.tensorboard)["loss"]] == list(range(1, 9))


def test_each_event_file_is_read_behind_the_one_before_it(layout, clock):
    names = []
    for number in range(12):
        attempt = recorder(layout, 0, number)
        attempt.tensorboard()
        train(attempt, 0, number + 1, number + 3)
        attempt.close()
        names += set(os.listdir(layout.tensorboard)) - set(names)
    assert names == sorted(names)
    assert clock.slept
    assert max(clock.slept) <= 1.0
    assert shown(layout.tensorboard) == recorded(layout)


def test_a_clock_that_is_far_behind_is_said_and_not_waited_for(layout, clock, capsys):
    recorder(layout).tensorboard()
    clock.ahead -= 1000
    recorder(layout).tensorboard()
    assert clock.slept == []
    assert "this node's clock is 100" in capsys.readouterr().out


def test_tensorboards_arguments_are_the_users_but_for_what_keeps_the_curve(layout, tmp_path):
    attempt = recorder(layout)
    with pytest.raises(UsageError, match=r"run.tensorboard\(purge_step=…\)"):
        attempt.tensorboard(purge_step=3)
    with pytest.raises(UsageError, match="no_such"):
        attempt.tensorboard(no_such=3)
    writer = attempt.tensorboard(tmp_path / "elsewhere", flush_secs=7, filename_suffix=".mine")
    assert writer.flush_secs == 7
    assert [name.endswith(".mine") for name in os.listdir(tmp_path / "elsewhere")] == [True]
    attempt.close()


def test_without_the_tensorboard_package_it_is_said_what_to_install(layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'hpcckpt\[tensorboard\]'"):
        recorder(layout).tensorboard()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_event_files_that_cannot_be_written_end_the_curve_and_nothing_else(layout, capsys):
    attempt = recorder(layout)
    attempt.tensorboard()
    train(attempt, 0, 1, 2)
    attempt.flush(0, 2)
    for path in layout.tensorboard.iterdir():
        path.unlink()
    layout.tensorboard.rmdir()
    for step in (3, 4):
        train(attempt, 0, step, step)
        attempt.flush(0, step)
    attempt.close()
    assert capsys.readouterr().out.count("hpcckpt: note: TensorBoard: ") == 1
    assert [line["step"] for line in read_lines(layout.metrics)] == [1, 2, 3, 4]
    # The next attempt makes it whole again.
    attempt = recorder(layout, 0, 3)
    attempt.tensorboard()
    attempt.close()
    assert [step for step, _ in shown(layout.tensorboard)["loss"]] == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_no_reason_not_to_train(layout, capsys):
    layout.tensorboard.write_text("")
    attempt = recorder(layout)
    assert attempt.tensorboard() is None
    train(attempt, 0, 1, 1)
    attempt.close()
    out = capsys.readouterr().out
    assert out.count("hpcckpt: note: TensorBoard: ") == 1
    assert "the training goes on without" in out


class Service:
    """What Weights & Biases keeps of each run, and a stand-in for its package."""

    def __init__(self):
        self.rows, self.calls, self.finished, self.axes = defaultdict(list), [], [], []

    def init(self, *, id, resume, dir, name, project=None, config=None, mode=None):  # noqa: A002 - wandb's names
        assert resume == "allow"
        assert os.path.isdir(dir)
        self.calls.append({"id": id, "name": name, "project": project, "config": config, "mode": mode})
        rows = self.rows[id]
        summary = {name: value for row in rows for name, value in row.items()}
        return SimpleNamespace(
            id=id,
            summary=summary,
            log=lambda row: rows.append(dict(row)),
            define_metric=lambda name, **how: self.axes.append((name, how)),
            finish=lambda: self.finished.append(id),
        )

    def sent(self, id):  # noqa: A002
        """Return the rows of a run without the mark that tells a later attempt how far they go."""
        assert all(row.get("hpcckpt/step") in (None, row["step"]) for row in self.rows[id])
        return [{name: value for name, value in row.items() if name != "hpcckpt/step"} for row in self.rows[id]]


@pytest.fixture
def service(monkeypatch):
    service, module = Service(), ModuleType("wandb")
    module.init = service.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


def test_wandb_gets_a_row_for_each_step_with_all_that_was_given_in_it(layout, service):
    attempt = recorder(layout)
    run = attempt.wandb(project="p", config={"lr": 0.1})
    assert service.calls == [{"id": run.id, "name": "digits", "project": "p", "config": {"lr": 0.1}, "mode": None}]
    assert service.axes == [("*", {"step_metric": "step"}), ("hpcckpt/step", {"hidden": True})]
    train(attempt, 0, 1, 2, value=0.5)
    attempt.flush(0, 2)
    assert service.sent(run.id) == [{"epoch": 0, "step": 1, "loss": 0.5}]  # the second may get a report
    attempt.log(0, 2, {"evaluated": 1.0})
    attempt.report(0, 2, {"val": math.inf, "phase": "end"})
    attempt.flush(0, 2)
    attempt.close()
    assert service.sent(run.id) == [
        {"epoch": 0, "step": 1, "loss": 0.5},
        {"epoch": 0, "step": 2, "loss": 0.5, "val": math.inf, "phase": "end", "evaluated": 1.0},
    ]
    assert service.finished == [run.id]


def test_a_run_that_is_told_to_stop_waits_for_no_service_and_goes_on_with_the_same_one(layout, service):
    attempt = recorder(layout)
    run = attempt.wandb()
    train(attempt, 0, 1, 3)
    attempt.flush(0, 3, durable=True)
    attempt.close(finished=False)
    assert service.finished == []
    attempt = recorder(layout, 0, 3)
    assert attempt.wandb().id == run.id
    attempt.report(0, 3, {"val": 1.0})
    attempt.close()
    assert [row["step"] for row in service.sent(run.id)] == [1, 2, 3]
    assert service.sent(run.id)[-1] == {"epoch": 0, "step": 3, "loss": 3 / 7, "val": 1.0}


def test_a_finished_run_that_is_made_longer_goes_on_with_the_next_row(layout, service):
    attempt = recorder(layout)
    run = attempt.wandb()
    train(attempt, 0, 1, 2)
    attempt.log(0, 2, {"evaluated": 1.0})
    attempt.flush(0, 2)
    attempt.close()
    attempt = recorder(layout, 1, 2)
    attempt.wandb()
    train(attempt, 1, 3, 4)
    attempt.flush(1, 4)
    attempt.close()
    assert [row["step"] for row in service.sent(run.id)] == [1, 2, 3, 4]
    # What was logged in the last evaluation has step 3, too; it could not be known that this one would come.
    assert [row.get("evaluated") for row in service.sent(run.id)] == [None, 1.0, 1.0, None]


@pytest.mark.usefixtures("service")
def test_a_kill_keeps_the_id_and_a_request_to_go_on_from_elsewhere_makes_another_one(layout):
    first = recorder(layout).wandb().id
    assert recorder(layout).wandb().id == first
    assert layout.wandb.stat().st_mode & 0o777 == 0o600
    write_json(layout.resume_request, {"state": "applied"})
    second = recorder(layout).wandb().id
    assert recorder(layout).wandb().id == second
    write_json(layout.resume_request, {"state": "applied"})  # the same request, made again
    assert len({first, second, recorder(layout).wandb().id}) == 3


def test_a_new_id_gets_the_points_from_before_the_rewind(layout, service):
    attempt = recorder(layout)
    attempt.wandb()
    train(attempt, 0, 1, 6)
    attempt.flush(0, 6)
    write_json(layout.resume_request, {"state": "applied"})
    attempt = recorder(layout, 0, 3)
    run = attempt.wandb()
    train(attempt, 0, 4, 5, value=0.0)
    attempt.flush(0, 5)
    attempt.close()
    assert [(row["step"], row["loss"]) for row in service.sent(run.id)] == [(1, 1 / 7), (2, 2 / 7), (3, 3 / 7), (4, 0.0), (5, 0.0)]


def test_a_row_of_the_users_own_that_is_ahead_of_the_others_costs_none(layout, service):
    run = recorder(layout).wandb()
    for start, end, flushed in ((0, 6, 3), (3, 8, 8)):
        attempt = recorder(layout, 0, start)
        assert attempt.wandb().id == run.id
        for done in range(start, end):
            attempt.log(0, done, {"loss": done})
            if done + 1 == flushed:
                attempt.flush(0, flushed)
        service.rows[run.id].append({"samples": "an image", "step": end})
    attempt.close()
    assert [row["step"] for row in service.sent(run.id) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.usefixtures("service")
def test_a_damaged_id_is_replaced(layout):
    layout.wandb.write_text("{")
    run = recorder(layout).wandb()
    assert recorder(layout).wandb().id == run.id


@pytest.mark.parametrize("name", ["id", "resume", "resume_from", "fork_from"])
def test_wandbs_arguments_are_the_users_but_for_what_keeps_the_curve(layout, service, name):
    with pytest.raises(UsageError, match=rf"run.wandb\({name}=…\).*delete .*wandb.json"):
        recorder(layout).wandb(**{name: "mine"})
    with pytest.raises(UsageError, match="no_such"):
        recorder(layout).wandb(no_such=1)
    recorder(layout).wandb(name="mine", mode="offline")
    assert (service.calls[0]["name"], service.calls[0]["mode"]) == ("mine", "offline")


@pytest.mark.parametrize("module", [None, ModuleType("wandb")], ids=["none", "a folder of that name"])
def test_without_the_wandb_package_it_is_said_what_to_install(layout, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UsageError, match="pip install wandb"):
        recorder(layout).wandb()


@pytest.mark.usefixtures("service")
def test_a_run_of_wandb_that_was_there_before_is_refused(layout):
    sys.modules["wandb"].run = object()
    with pytest.raises(UsageError, match=r"wandb\.init was called before"):
        recorder(layout).wandb()


@pytest.mark.usefixtures("service")
def test_a_service_that_is_gone_ends_the_curve_and_nothing_else(layout, capsys):
    attempt = recorder(layout)
    run = attempt.wandb()

    def gone(_):
        raise ConnectionResetError("Connection lost")

    run.log = gone
    for step in (1, 2, 3):
        train(attempt, 0, step, step)
        attempt.flush(0, step)
    attempt.close()
    assert (
        capsys.readouterr().out.count("hpcckpt: note: Weights & Biases: ConnectionResetError: Connection lost; this curve ends here") == 1
    )
    assert [line["step"] for line in read_lines(layout.metrics)] == [1, 2, 3]


@pytest.mark.usefixtures("service")
def test_a_service_that_cannot_be_reached_is_no_reason_not_to_train(layout, capsys):
    def unreachable(**_):
        raise TimeoutError("no answer")

    sys.modules["wandb"].init = unreachable
    attempt = recorder(layout)
    assert attempt.wandb() is None
    train(attempt, 0, 1, 1)
    attempt.close()
    assert capsys.readouterr().out.count("hpcckpt: note: Weights & Biases: TimeoutError: no answer; the training goes on without") == 1


def script(epochs):
    """Yield (method, epoch, step done, values) and, between, the positions (epoch, step) that a checkpoint can be of."""
    done = 0
    for epoch, steps in enumerate(epochs):
        for number in range(steps):
            if number % 2:
                yield "report", epoch, done, {"early": float(number)}
            yield "log", epoch, done, {"loss": float(done)}
            done += 1
            yield epoch, done
        yield "log", epoch, done, {"evaluated": float(epoch)}
        yield "report", epoch, done, {"val": float(epoch)}
        yield epoch + 1, done


EPOCHS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
INTERRUPTIONS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9)), max_size=4)


def interrupted(layout, whole, interruptions, attach, between=lambda _lost: None):
    """Run a script with interruptions: each attempt goes on at some checkpoint, flushes now and then, and is killed somewhere."""
    saved, at, attempts = {0: (0, 0)}, 0, []
    for length, every, back, lost in [*interruptions, (len(whole), 3, 0, None)]:
        attempt = recorder(layout, *saved[at])
        attempts.append(attempt)
        attach(attempt)
        epoch, done = saved[at]
        for number in range(at, min(at + length, len(whole))):
            what = whole[number]
            if len(what) == 2:
                done = what[1]
                attempt.flush(epoch, done)
                saved[number + 1] = what
            else:
                epoch = what[1]
                getattr(attempt, what[0])(*what[1:])
                if number % every == 0:
                    attempt.flush(epoch, done)
        if lost is not None:
            between(lost)
            at = sorted(saved)[-1 - back % len(saved)]
            saved = {number: position for number, position in saved.items() if number <= at}
    return attempts


@settings(deadline=None, max_examples=25)
@given(epochs=EPOCHS, interruptions=INTERRUPTIONS)
def test_tensorboard_shows_the_curve_of_an_uninterrupted_run_wherever_it_was_interrupted(tmp_path_factory, epochs, interruptions):
    layout = RunLayout(tmp_path_factory.mktemp("run"))
    attempts = interrupted(layout, list(script(epochs)), interruptions, lambda attempt: attempt.tensorboard())
    assert shown(layout.tensorboard) == recorded(layout)
    assert [step for step, _ in shown(layout.tensorboard)["loss"]] == list(range(1, sum(epochs) + 1))
    for attempt in attempts:
        attempt.close()


@settings(deadline=None, max_examples=100)
@given(epochs=EPOCHS, interruptions=INTERRUPTIONS)
def test_wandb_has_each_row_once_wherever_it_was_interrupted(tmp_path_factory, epochs, interruptions):
    layout, service, module = RunLayout(tmp_path_factory.mktemp("run")), Service(), ModuleType("wandb")
    module.init = service.init

    def lose(count):
        """What was on its way to the service dies with the process."""
        for rows in service.rows.values():
            del rows[max(len(rows) - count, 0) :]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", module)
        attempts = interrupted(layout, list(script(epochs)), interruptions, lambda attempt: attempt.wandb(), lose)
        attempts[-1].close()
    rows = defaultdict(dict)
    for line in sorted(read_lines(layout.metrics), key=lambda line: line["step"]):
        step = min(line["step"], sum(epochs))
        rows[step] |= {name: value for name, value in line.items() if name != "kind"} | {"step": step}
    assert [service.sent(run_id) for run_id in service.rows] == [list(rows.values())]


def test_no_thread_is_left_behind_a_curve_that_was_closed(layout):
    before = threading.active_count()
    attempt = recorder(layout)
    attempt.tensorboard()
    assert threading.active_count() > before
    attempt.close()
    assert threading.active_count() == before
