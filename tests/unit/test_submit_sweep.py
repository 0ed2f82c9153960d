"""A grid of runs: its points, their folders, and what is refused before anything is written."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt import config
from hpcckpt.errors import ConfigError
from hpcckpt.launch import sweep
from support.submitting import SBATCH, Submit, contents, make_folder, refusal, submit_from, write_program

ENTRY = "entrypoint: training:main\ncluster: slurm\nrun_dir: runs\nargs: {lr: 1, x: 1}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.fixture
def submit(folder: Path) -> Submit:
    return submit_from(folder)


def expanded(*sweeps: str, settings: tuple[str, ...] = (), text: str = ENTRY) -> list[sweep.Point]:
    return sweep.expand(lambda overrides: config.parse(text, overrides, where="exp.yaml"), settings, sweeps)


def values(*sweeps: str, key: str = "x") -> list[object]:
    return [config.resolve(point.merged).args[key] for point in expanded(*sweeps)]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1,2", [1, 2]),
        ("0.1,1e-3", [0.1, 1e-3]),
        ("[1,2],[3,4]", [[1, 2], [3, 4]]),
        ("[[1,2],3],[]", [[[1, 2], 3], []]),
        ("{a: 1, b: 2},null", [{"a": 1, "b": 2}, None]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,b",\'it"s\'', ["a,b", 'it"s']),
        ("['a],b',c],d", [["a],b", "c"], "d"]),
        ("it's,b", ["it's", "b"]),
        ("a b,c", ["a b", "c"]),
        ("1,'1'", [1, "1"]),
        ("${args.lr},2", [1, 2]),
        ("${oc.env:NOT_THERE,3},2", ["3", 2]),
        ("true,1", [True, 1]),
    ],
)
def test_values_are_split_at_top_level_and_read_as_settings_are(text: str, read: list[object]) -> None:
    assert values(f"args.x={text}") == read


def test_a_grid_is_the_product_and_the_last_key_varies_fastest() -> None:
    points = expanded("args.lr=0.1,0.01", "args.seed=1,2,3")
    assert [point.own for point in points][:3] == [("args.lr=0.1", f"args.seed={seed}") for seed in (1, 2, 3)]
    assert len(points) == 6
    assert [config.resolve(point.merged).run_dir for point in points[:2]] == [
        "runs/args.lr=0.1,args.seed=1",
        "runs/args.lr=0.1,args.seed=2",
    ]


def test_a_sweep_of_one_value_is_a_setting() -> None:
    (point,) = expanded("args.lr=0.5", settings=("args.x=2",))
    assert (point.own, config.resolve(point.merged).args, config.resolve(point.merged).run_dir) == ((), {"lr": 0.5, "x": 2}, "runs")


def test_run_directories_that_differ_are_used_as_they_are_and_those_that_do_not_are_made_to() -> None:
    own = expanded("args.lr=0.1,0.01", text=ENTRY.replace("run_dir: runs", "run_dir: runs/lr${args.lr}"))
    assert [config.resolve(point.merged).run_dir for point in own] == ["runs/lr0.1", "runs/lr0.01"]
    some = expanded("args.lr=0.1,0.01", "args.x=1,2", text=ENTRY.replace("run_dir: runs", "run_dir: runs/lr${args.lr}"))
    assert [config.resolve(point.merged).run_dir for point in some][::3] == [
        "runs/lr0.1/args.lr=0.1,args.x=1",
        "runs/lr0.01/args.lr=0.01,args.x=2",
    ]
    assert "run_dir: runs/lr${args.lr}/args.lr=0.1,args.x=1\n" in config.dump(some[0].merged)
    spelled = expanded("run_dir=runs/a,./runs/a")
    assert len({config.resolve(point.merged).run_dir for point in spelled}) == 2


@given(st.lists(st.lists(st.text(), min_size=1, max_size=3), min_size=2, max_size=8, unique_by=tuple))
def test_any_settings_have_a_folder_of_their_own_with_a_name_that_means_nothing_to_anybody(points: list[list[str]]) -> None:
    names = [sweep.folder_name([f"args.x={text}" for text in point]) for point in points]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) <= 120
        assert not set(name) & set("/%$\\'\"`;&|<>()[]{}*?~# \t\n\0")
        assert name.startswith("args.x=")


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["args.lr"], "--sweep 'args.lr' is not of the form key=value,value"),
        (["=1,2"], "is not of the form key=value,value"),
        (["args.lr=1,,2"], "a value is empty"),
        (["args.lr=1,"], "a value is empty"),
        (["args.lr=1,2,1"], "the value 1 is there twice"),
        (["args.lr=0.1,1e-1"], "the value 0.1 is there twice"),
        (["args.lr=1,2", "args.lr=3,4"], "--sweep args.lr: the key is given twice"),
        (["args.lr=1,2", "args.lr=3"], "--sweep args.lr: the key is given twice"),
        (["args.lr=1,2", "args.x=2"], None),
        (["slurm.nodes=1,2"], "--sweep: slurm.nodes is 1 in one point and 2 in another, but an array has one batch script"),
        (["slurm.setup=[a],[b]"], "slurm.setup is ['a'] in one point"),
        (["requeue.signal=USR1,USR2"], "requeue.signal is 'USR1'"),
        (["requeue.lead_time_s=60,90"], "requeue.lead_time_s is 60"),
        (["requeue.enabled=true,false"], "requeue.enabled is True"),
        (["cluster=slurm,local"], "cluster is 'slurm'"),
        (["name=a,b"], "name is 'a'"),
        (["args.time=5,6", "slurm.time_min='${args.time}'"], "slurm.time_min is 5"),
        (["requeue.max_stalled=3,4"], None),
        (["seed=1,two"], "seed=two: command line: seed=two: seed: Value 'two'"),
        (["seed=1,-1"], "seed=-1: exp.yaml and the command line: seed: -1 must be at least 0"),
        (["args.lr=1,2", "checkpoint.mod=min,max"], "args.lr=1 checkpoint.mod=min: command line: checkpoint.mod=min: unknown key"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_a_bad_point_is_named(sweeps: list[str], said: str | None) -> None:
    if said is None:
        assert expanded(*sweeps)
        return
    with pytest.raises(ConfigError) as caught:
        expanded(*sweeps)
    assert said in str(caught.value)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sweep_is_one_array_and_each_point_knows_its_task(submit: Submit, folder: Path) -> None:
    done = submit("conf=exp", "--sweep", "args.lr=0.1,0.01", "args.x=1,2", "slurm.time_min=5")
    runs = [folder / "runs" / "exp" / f"args.lr={lr},args.x={x}" for lr in (0.1, 0.01) for x in (1, 2)]
    assert done.stdout.splitlines() == ["7", *(f"7_{index} {run}" for index, run in enumerate(runs))]
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --array=0-3\n" in (folder / "submitted").read_text()
    assert (folder / "submitted").read_text() == (folder / "tested").read_text()
    for index, run in enumerate(runs):
        assert [(event["event"], event.get("job_id")) for event in lines_of(run / "events.jsonl")] == [
            ("submitting", None), ("submitted", f"7_{index}")
        ]  # fmt: skip
        assert yaml.safe_load((run / "config.yaml").read_text())["args"] == {"lr": (0.1, 0.01)[index // 2], "x": 1 + index % 2}
        assert str(run).encode() in (run / "logs" / f"7_{index}_submitted.pkl").read_bytes()
        assert oct(run.stat().st_mode & 0o777) == "0o700"


def test_looking_at_a_sweep_writes_nothing(submit: Submit, folder: Path) -> None:
    before = contents(folder)
    script = submit("conf=exp", "--sweep", "args.lr=0.1,0.01", "--dry-run").stdout
    assert f"{folder}/runs/exp/args.lr=0.1\n{folder}/runs/exp/args.lr=0.01\n" in script
    printed = list(yaml.safe_load_all(submit("--sweep", "args.lr=0.1,0.01", "conf=exp", "--print-config").stdout))
    assert [(each["args"]["lr"], each["run_dir"]) for each in printed] == [(lr, "runs/${name}/args.lr=" + str(lr)) for lr in (0.1, 0.01)]
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["args.lr=1,2", "resume.epoch=3"], 2, "args.lr=1: resume.epoch=3: "),
        (["entrypoint=training:main,training:mian"], 2, "training:mian: conf/exp.yaml: entrypoint: "),
        (["run_dir=a,training.py/b"], 2, "run_dir=training.py/b: "),
    ],
)
def test_a_bad_point_is_refused_with_nothing_written_for_the_others(
    submit: Submit, folder: Path, arguments: list[str], code: int, said: str
) -> None:
    message = refusal(submit("conf=exp", "--sweep", *arguments), code)
    assert said in message
    assert not (folder / "runs").exists()
    assert not (folder / "a").exists()


def test_too_many_points_are_refused_in_slurms_words(submit: Submit, folder: Path) -> None:
    write_program(folder, "sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1")
    assert refusal(submit("conf=exp", "--sweep", "args.lr=1,2"), 3).endswith("Invalid job array specification")
    assert not (folder / "runs").exists()


def test_an_array_that_is_refused_after_its_test_leaves_no_trace_in_any_point(submit: Submit, folder: Path) -> None:
    write_program(folder, "sbatch", "case $1 in --test-only) ;; *) echo 'sbatch: error: no' >&2; exit 1;; esac")
    assert refusal(submit("conf=exp", "--sweep", "args.lr=1,2"), 3) == "sbatch refused the job: sbatch: error: no"
    assert [path for path in (folder / "runs").rglob("*") if path.is_file()] == []


def test_a_point_whose_job_waits_still_is_refused_and_named(submit: Submit, folder: Path) -> None:
    assert submit("conf=exp", "--sweep", "args.lr=1,2").returncode == 0
    write_program(folder, "scontrol", 'case $3 in 7_1) echo "   JobState=PENDING";; *) echo "   JobState=COMPLETED";; esac')
    message = refusal(submit("conf=exp", "--sweep", "args.lr=1,2"), 2)
    assert message.startswith(f"args.lr=2: {folder}/runs/exp/args.lr=2: job 7_1 still waits or runs")
    assert "`scancel 7_1`" in message
    assert submit("conf=exp", "--sweep", "args.lr=1,3").returncode == 0


def test_an_sbatch_that_does_not_answer_says_how_to_find_out_and_its_job_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcckpt import launch
    from hpcckpt.errors import RunDirectoryError, SchedulerError

    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(launch.slurm, "SBATCH_TIMEOUT_S", 0.2)
    write_program(folder, "sbatch", 'case $1 in --test-only) ;; *) echo "$1" > path; exec sleep 60;; esac')
    points = sweep.expand(lambda overrides: config.load(Path("conf/exp.yaml"), overrides), ["name=a b"], [])
    runs = launch.check(points, "exp.yaml")
    with pytest.raises(SchedulerError, match=r"may have been submitted all the same: look for it with `squeue --me --name='a b'`"):
        launch.start(runs, lambda jobs: pytest.fail(f"announced {jobs}"))
    write_program(folder, "squeue", f'printf "5|/x.sh\\n6|%s\\n" "$(/bin/cat {folder}/path)"')
    with pytest.raises(RunDirectoryError, match=r"job 6 still waits or runs in this run directory; wait, end it with `scancel 6`"):
        launch.check(points, "exp.yaml")
    write_program(folder, "squeue", "echo '5|/x.sh'")
    write_program(folder, "sbatch", SBATCH)
    assert [job.job_id for job in launch.start(launch.check(points, "exp.yaml"), lambda _: None)] == ["7"]
    assert [event["event"] for event in lines_of(folder / "runs" / "a b" / "events.jsonl")] == ["submitting", "submitting", "submitted"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_sbatch_works_is_held_back_until_the_job_is_known(folder: Path, number: signal.Signals) -> None:
    # To sbatch as well, as by Ctrl-C in a terminal.
    body = f'case $1 in --test-only) ;; *) kill -{number.value} "$PPID" $$; echo "Submitted batch job 7";; esac'
    write_program(folder, "sbatch", body)
    done = submit_from(folder)("conf=exp")
    assert done.stdout == "7\n"
    assert done.returncode == (130 if number == signal.SIGINT else -number)
    root = folder / "runs" / "exp"
    assert lines_of(root / "events.jsonl")[-1]["job_id"] == "7"
    assert (root / "logs" / "7_submitted.pkl").exists()
    assert (root / "config.yaml").exists()


@pytest.mark.parametrize(("lead_time_s", "code", "said"), [(5, 2, "are too short"), (10, 0, "are tight"), (60, 0, "")])
def test_a_lead_time_is_held_against_what_was_measured(submit: Submit, folder: Path, lead_time_s: int, code: int, said: str) -> None:
    assert submit("conf=exp", "--sweep", "args.lr=1,2").returncode == 0
    with (folder / "runs" / "exp" / "args.lr=2" / "events.jsonl").open("a") as ledger:
        ledger.write('{"event": "saved", "step": 1, "save_s": 3.0}\n')
    done = submit("conf=exp", "--sweep", "args.lr=1,2", f"requeue.lead_time_s={lead_time_s}")
    assert done.returncode == code
    assert said in done.stderr
    assert ("args.lr=2: " in done.stderr) == (code == 2)
    assert len(done.stderr.splitlines()) == bool(said)
