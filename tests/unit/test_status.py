"""`hpcckpt status`: each state from a ledger and what Slurm says, and nothing that it meets stops it."""

import json
import os
from pathlib import Path

import pytest

from hpcckpt.cli import status
from hpcckpt.layout import RunLayout
from hpcckpt.store.durable import write_json
from support.submitting import write_program

SUBMITTED = {"event": "submitted", "job_id": "7", "cluster": "slurm", "supervisor": None}
ATTEMPT = {"event": "attempt", "job_id": "7"}
FINISHED = {"event": "finished"}
REQUEUE = {"event": "requeue"}
ENDED = {"event": "ended", "reason": "the job was cancelled"}
FAILED = {"event": "failed", "rank": 1, "error": "ValueError: x"}
LOST = {"event": "lost", "fate": "out_of_memory"}
SUCCESSOR = {"event": "successor", "job_id": "8", "of": "7"}
NEW = {**SUBMITTED, "job_id": "9"}
BEGUN = [SUBMITTED, ATTEMPT]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with Slurm's answer in the file `queue`; without that file Slurm does not answer."""
    write_program(
        tmp_path, "squeue", '[ -f queue ] || { echo "Unable to contact slurm controller" >&2; exit 1; }; cat queue; echo "$@" >> asked'
    )
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(root: Path, events: list[dict[str, object]]) -> RunLayout:
    layout = RunLayout(root)
    layout.checkpoints.mkdir(parents=True)
    layout.events.write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))
    return layout


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert status.main([*arguments, "--json"]) == 0
    printed: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return printed


@pytest.mark.parametrize(
    ("events", "queue", "state", "reason"),
    [
        pytest.param([SUBMITTED], "7|PENDING", "pending", "", id="not begun"),
        pytest.param([SUBMITTED], "7|RUNNING", "pending", "", id="its processes start"),
        pytest.param(BEGUN, "7|RUNNING", "running", "", id="running"),
        pytest.param([ATTEMPT, SUBMITTED], "7|RUNNING", "running", "", id="faster than its submission"),
        pytest.param([*BEGUN, REQUEUE], "7|RUNNING", "waiting", "", id="about to be requeued"),
        pytest.param([*BEGUN, REQUEUE], "7|PENDING", "waiting", "", id="requeued"),
        pytest.param(BEGUN, "7|PENDING", "waiting", "", id="requeued by Slurm"),
        pytest.param([*BEGUN, REQUEUE, ATTEMPT], "7|RUNNING", "running", "", id="second attempt"),
        pytest.param([*BEGUN, REQUEUE, SUCCESSOR], "8|PENDING", "waiting", "", id="a successor"),
        pytest.param([*BEGUN, FINISHED], "", "finished", "", id="finished"),
        pytest.param([*BEGUN, FINISHED], "7|COMPLETED", "finished", "", id="finished, and Slurm remembers"),
        pytest.param([*BEGUN, FINISHED], "7|COMPLETING", "finished", "", id="finished just now"),
        pytest.param([*BEGUN, FINISHED, NEW], "9|PENDING", "pending", "", id="submitted again"),
        pytest.param([*BEGUN, FINISHED, NEW], "", "stopped", "job 9 ended before its processes began", id="cancelled while pending"),
        pytest.param([*BEGUN, ENDED], "", "stopped", "the job was cancelled", id="cancelled"),
        pytest.param([*BEGUN, REQUEUE], "", "stopped", "it was requeued, but no attempt followed", id="cancelled while waiting"),
        pytest.param([*BEGUN, FAILED], "", "failed", "rank 1 failed: ValueError: x", id="raised"),
        pytest.param([*BEGUN, FAILED, ENDED], "", "failed", "rank 1 failed: ValueError: x", id="raised, and not requeued"),
        pytest.param([*BEGUN, LOST, ENDED], "", "failed", "a process of it was killed (out of memory)", id="killed"),
        pytest.param(BEGUN, "", "failed", "its processes ended without a word (killed, or out of memory?)", id="gone"),
        pytest.param(BEGUN, None, "unknown", "", id="no answer, begun"),
        pytest.param([SUBMITTED], None, "unknown", "", id="no answer, not begun"),
        pytest.param([*BEGUN, FINISHED], None, "finished", "", id="no answer, finished"),
        pytest.param([*BEGUN, FINISHED, NEW], None, "unknown", "", id="no answer, submitted again"),
        pytest.param([{**SUBMITTED, "supervisor": "1@1"}, ATTEMPT, FINISHED], "", "finished", "", id="local"),
        pytest.param([{**SUBMITTED, "supervisor": "1@1", "host": "elsewhere"}, ATTEMPT], "", "unknown", "", id="local to another machine"),
    ],
)
def test_a_state_is_what_ledger_and_slurm_say_together(
    folder: Path, capsys: pytest.CaptureFixture[str], events: list[dict[str, object]], queue: str | None, state: str, reason: str
) -> None:
    make_run(folder / "run", events)
    (folder / "queue").write_text(f"{queue}\n") if queue is not None else (folder / "queue").unlink()
    (row,) = rows(capsys, "run")
    assert (row["state"], row["reason"]) == (state, reason)
    assert row["attempts"] == sum(event["event"] == "attempt" for event in events)


def test_a_run_on_this_machine_is_alive_as_long_as_its_supervisor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpcckpt.launch import local

    supervisor = local._process(os.getpid())
    make_run(folder / "run", [{**SUBMITTED, "cluster": "local", "supervisor": supervisor}, ATTEMPT])
    assert rows(capsys, "run")[0]["state"] == "running"
    assert not (folder / "asked").exists()


def test_a_folder_of_runs_is_a_line_each_and_one_question(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        make_run(folder / "runs" / "sweep" / f"x={index}", [{**SUBMITTED, "job_id": f"7_{index}"}, {**ATTEMPT, "job_id": f"7_{index}"}])
    layout = make_run(folder / "runs" / "one\x1b[2J", [SUBMITTED])
    (layout.checkpoints / "a.pt").write_bytes(b"x")
    os.utime(layout.checkpoints / "a.pt", (1, 1))
    write_json(layout.latest, {"file": "a.pt", "epoch": 4, "step": 1234})
    (folder / "queue").write_text("7|RUNNING\n7_0|RUNNING\n7_2|PENDING\n")
    assert status.main(["runs", "runs/sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "JOB", "ATTEMPTS", "EPOCH", "STEP", "CHECKPOINT", "AGE", "REASON"]
    assert lines[1].split()[:7] == ["runs/one?[2J", "pending", "7", "0", "4", "1234", "a.pt"]
    assert lines[1].endswith(" d")
    assert [line.split()[:3] for line in lines[2:]] == [
        ["runs/sweep/x=0", "running", "7_0"], ["runs/sweep/x=1", "failed", "7_1"], ["runs/sweep/x=2", "waiting", "7_2"]
    ]  # fmt: skip
    (asked,) = (folder / "asked").read_text().splitlines()
    assert "--jobs=7,7_0,7_1,7_2" in asked


def test_a_run_within_the_folder_of_another_is_found_and_its_checkpoints_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "run", [SUBMITTED])
    make_run(folder / "run" / "x=1", [SUBMITTED])
    make_run(folder / "run" / "checkpoints" / "no", [SUBMITTED])
    assert [row["run"] for row in rows(capsys, "run")] == ["run", "run/x=1"]


@pytest.mark.parametrize("pointer", [b"", b"{", b"[]", b"\xff", b'{"file": "../../../etc/passwd"}'])
def test_a_damaged_pointer_or_ledger_is_no_reason_to_fail(folder: Path, capsys: pytest.CaptureFixture[str], pointer: bytes) -> None:
    layout = make_run(folder / "run", [])
    layout.latest.write_bytes(pointer)
    layout.events.write_bytes(b'{"event": "submitted"}\n[]\n{"ev')
    (row,) = rows(capsys, "run")
    assert (row["epoch"], row["age_s"]) == (None, None)


@pytest.mark.parametrize(("path", "said"), [("nowhere", "nowhere: there is no such folder"), ("bin", "bin: holds no run directory")])
@pytest.mark.usefixtures("folder")
def test_what_is_no_run_is_bad_input(capsys: pytest.CaptureFixture[str], path: str, said: str) -> None:
    assert status.main([path]) == 2
    assert capsys.readouterr().err.startswith(f"hpcckpt: {said}; give a run directory, or a folder of some")
