"""The batch script: what it asks of Slurm, and that nothing in a configuration is run by the shell that reads it."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcckpt import config, launch
from hpcckpt.launch import slurm

HOSTILE = [
    "a b",
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "& touch x",
    "| touch x",
    "> x",
    "'",
    '"',
    "'; touch x; '",
    "$HOME",
    "*",
    "\\",
    "#",
    "é",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an srun that writes down its arguments, and an sbatch beside it."""
    (tmp_path / "bin").mkdir()
    body = 'printf "%s\\n" "$@" > seen; echo "$SUBMITIT_EXECUTOR" > executor; exit "${SRUN_CODE:-0}"'
    for name, text in {"srun": body, "sbatch": "exit 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o700)
    for name in ("env", "true"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    slurm.blocking.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")  # put back afterwards
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(**values: object) -> config.RunConfig:
    """Return the configuration with these keys; `slurm_x` is slurm.x."""
    merged = config.parse("entrypoint: a.b:main\ncluster: slurm\n")
    for key, value in values.items():
        section, _, name = key.partition("_")
        holder = merged[section] if section in ("slurm", "requeue") else merged
        holder[name if holder is not merged else key] = value
    return config.resolve(config.parse(config.dump(merged), where="exp.yaml"))


def script(**values: object) -> str:
    """Return the script for a configuration with these keys."""
    return launch.batch_script([parsed(**values)], "exp.yaml")


def options(text: str) -> dict[str, str | None]:
    """Return sbatch's options as sbatch splits them."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words = shlex.split(line)
            assert len(words) == 2, line
            key, separator, value = words[1].partition("=")
            assert key not in found, f"{key} twice"
            found[key] = value if separator else None
    return found


def seen_by_srun(text: str, folder: Path) -> list[str]:
    """Run the script as Slurm's batch shell would, and return the arguments that srun got."""
    subprocess.run(["/bin/bash", "-c", text], cwd=folder, check=True, timeout=60, capture_output=True)
    return (folder / "seen").read_text().splitlines()


def test_a_script_asks_for_the_warning_the_requeue_and_logs_that_go_on(folder: Path) -> None:
    asked = options(script())
    assert asked["--signal"] == "USR1@120"
    assert asked["--requeue"] is None
    assert asked["--open-mode"] == "append"
    assert asked["--output"] == f"{folder}/runs/run/logs/%j_0_log.out"
    assert asked["--error"] == f"{folder}/runs/run/logs/%j_0_log.err"
    assert "--no-requeue" not in asked
    assert "--wckey" not in asked


@pytest.mark.usefixtures("folder")
def test_a_script_asks_for_what_the_slurm_section_says() -> None:
    given = {"nodes": 2, "tasks_per_node": 3, "gpus_per_node": 4, "cpus_per_task": 5, "mem_gb": 1.5, "time_min": 90}
    texts = [
        "partition",
        "account",
        "qos",
        "constraint",
        "gres",
        "reservation",
        "exclude",
        "dependency",
        "comment",
        "mail_type",
        "mail_user",
    ]
    section = given | {key: f"{key}-value" for key in texts} | {"extra": {"switches": 1, "exclusive": True, "mem_bind": "local"}}
    asked = options(script(name="x y", **{f"slurm_{key}": value for key, value in section.items()}))
    expected = {
        "--job-name": "x y", "--nodes": "2", "--ntasks-per-node": "3", "--gpus-per-node": "4", "--cpus-per-task": "5", "--mem": "1536M",
        "--time": "90", "--switches": "1", "--exclusive": None, "--mem-bind": "local",
    } | {f"--{key.replace('_', '-')}": f"{key}-value" for key in texts}  # fmt: skip
    assert expected.items() <= asked.items()


@pytest.mark.usefixtures("folder")
def test_what_is_not_asked_for_is_left_to_the_site() -> None:
    assert options(script()).keys() == {
        "--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--time", "--signal", "--requeue", "--open-mode", "--output",
        "--error",
    }  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_the_signal_the_lead_and_the_requeue_are_those_of_the_configuration() -> None:
    asked = options(script(requeue_signal="USR2", requeue_lead_time_s=60, requeue_enabled=False))
    assert asked["--signal"] == "USR2@60"
    assert asked["--no-requeue"] is None
    assert "--requeue" not in asked


def test_srun_ends_all_ranks_with_one_and_gives_each_its_cpus(folder: Path) -> None:
    seen = seen_by_srun(script(slurm_cpus_per_task=3), folder)
    logs = f"{folder}/runs/run/logs"
    assert seen == [
        "--unbuffered", "--output", f"{logs}/%j_%t_log.out", "--error", f"{logs}/%j_%t_log.err", "--kill-on-bad-exit=1",
        "--cpus-per-task=3", "env", "--block-signal=USR1,TERM", sys.executable, "-u", "-m", "submitit.core._submit", logs,
    ]  # fmt: skip
    assert (folder / "executor").read_text() == "slurm\n"


def test_setup_lines_run_before_srun_as_they_are(folder: Path) -> None:
    seen_by_srun(script(slurm_setup=["export A='b c'", 'echo "$A" > setup']), folder)
    assert (folder / "setup").read_text() == "b c\n"


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_is_run_by_a_shell_or_changed_on_its_way(folder: Path, value: str) -> None:
    text = script(
        name=value,
        run_dir=f"runs dir/{value}",
        slurm_comment=value,
        slurm_partition=value,
        slurm_account=value,
        slurm_reservation=value,
        slurm_mail_user=value,
        slurm_extra={"switches": value},
        slurm_python=f"run {shlex.quote(value)} python",
    )
    asked = options(text)
    assert {asked[f"--{key}"] for key in ("job-name", "comment", "partition", "account", "reservation", "mail-user", "switches")} == {value}
    logs = f"{folder}/runs dir/{value}/logs"
    assert asked["--output"] == f"{logs}/%j_0_log.out"
    before = sorted(folder.iterdir())
    seen = seen_by_srun(text, folder)
    assert seen[:3] == ["--unbuffered", "--output", f"{logs}/%j_%t_log.out"]
    assert seen[-7:] == ["run", value, "python", "-u", "-m", "submitit.core._submit", logs]
    assert sorted(folder.iterdir()) == sorted([*before, folder / "seen", folder / "executor"])


def test_a_command_for_python_is_words_not_shell(folder: Path) -> None:
    seen = seen_by_srun(script(slurm_python="apptainer exec 'my image.sif' python; touch x"), folder)
    assert seen[9:16] == ["apptainer", "exec", "my image.sif", "python;", "touch", "x", "-u"]
    assert not (folder / "x").exists()


def test_what_is_printed_what_is_tested_and_what_is_submitted_are_the_same(folder: Path) -> None:
    (folder / "bin" / "sbatch").write_text(
        '#!/bin/sh\ncase $1 in --test-only) /bin/cat > tested;; *) /bin/cat "$1" > submitted; echo "Submitted batch job 7";; esac\n'
    )
    (folder / "a.py").write_text("def main(run): pass\n")
    (folder / "exp.yaml").write_text("entrypoint: a:main\ncluster: slurm\nslurm: {comment: 'it''s $HOME', setup: [true]}\n")
    argv = [sys.executable, "-m", "hpcckpt.submit", "conf=exp.yaml"]
    printed = subprocess.run([*argv, "--dry-run"], cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout
    assert not (folder / "runs").exists()
    subprocess.run(argv, cwd=folder, capture_output=True, check=True, timeout=60)
    assert (folder / "tested").read_text() == (folder / "submitted").read_text() == printed
    assert "#SBATCH" in printed


def test_a_dry_run_on_this_machine_prints_the_command_and_its_setup(folder: Path) -> None:
    merged = config.parse("entrypoint: a.b:main\ncluster: local\nslurm: {tasks_per_node: 2, setup: [export A=1]}\nrun_dir: a b\n")
    lines = launch.batch_script([config.resolve(merged)], "exp.yaml").splitlines()
    assert lines[:2] == ["#!/bin/bash", "export A=1"]
    assert shlex.split(lines[-1]) == [sys.executable, "-u", "-m", "submitit.core._submit", f"{folder}/a b/logs"]
    assert not (folder / "a b").exists()


def run_batch(text: str, folder: Path, **environ: str) -> int:
    """Run the script as Slurm's batch shell would; returns its exit code."""
    done = subprocess.run(
        ["/bin/bash", "-c", text], cwd=folder, env={**os.environ, **environ}, check=False, timeout=60, capture_output=True
    )
    return done.returncode


@pytest.fixture
def after(folder: Path) -> Path:
    """A Python that writes down what it is called with behind a failed srun, and ends with $AFTER_CODE."""
    (folder / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > after\nexit "$AFTER_CODE"\n')
    (folder / "bin" / "python").chmod(0o700)
    return folder / "after"


@pytest.mark.parametrize("setup", [[], ["set -eu"]])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_failed_srun_is_looked_after_and_the_job_ends_with_the_code_of_that(
    folder: Path, after: Path, value: str, setup: list[str]
) -> None:
    text = script(run_dir=f"runs dir/{value}", slurm_python="python", slurm_setup=setup)
    assert run_batch(text, folder, SRUN_CODE="137", AFTER_CODE="0") == 0
    assert after.read_text().splitlines() == ["-m", "hpcckpt.after", f"{folder}/runs dir/{value}", "137"]
    assert run_batch(text, folder, SRUN_CODE="137", AFTER_CODE="76") == 76


def test_behind_an_srun_that_did_not_fail_nothing_is_started(folder: Path, after: Path) -> None:
    assert run_batch(script(slurm_python="python"), folder, AFTER_CODE="3") == 0
    assert not after.exists()


@pytest.mark.parametrize("value", HOSTILE)
def test_each_task_of_an_array_has_its_own_run_directory_and_logs(folder: Path, after: Path, value: str) -> None:
    run_dirs = [f"runs dir/{value}/{name}" for name in ("a", value, "b")]
    text = launch.batch_script(
        [parsed(run_dir=run_dir, slurm_python="python", slurm_setup=["echo set up"]) for run_dir in run_dirs], "x.yaml"
    )
    asked = options(text)
    assert (asked["--array"], asked["--output"], asked["--error"]) == ("0-2", "/dev/null", "/dev/null")
    for index, run_dir in enumerate(run_dirs):
        logs = folder / run_dir / "logs"
        logs.mkdir(parents=True)
        assert run_batch(text, folder, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(index), SRUN_CODE="9", AFTER_CODE="1") == 1
        seen = (folder / "seen").read_text().splitlines()
        assert seen[:5] == ["--unbuffered", "--output", f"{logs}/%A_%a_%t_log.out", "--error", f"{logs}/%A_%a_%t_log.err"]
        assert seen[-1] == str(logs)
        assert after.read_text().splitlines()[2:] == [str(folder / run_dir), "9"]
        assert (logs / f"7_{index}_0_log.out").read_text() == "set up\n"
        assert {path.name for path in logs.iterdir()} == {f"7_{index}_0_log.out", f"7_{index}_0_log.err"}


def test_a_signal_to_the_batch_shell_does_not_end_it_and_its_children_have_the_default(folder: Path) -> None:
    (folder / "bin" / "srun").write_text('#!/bin/sh\nkill -USR1 "$PPID"\nkill -USR2 "$PPID"\ntrap > traps\n')
    assert run_batch(script(), folder) == 0
    assert (folder / "traps").read_text() == ""


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_python_is_started_with_the_signals_blocked_that_would_end_it(folder: Path, name: str) -> None:
    (folder / "bin" / "srun").write_text('#!/bin/sh\nwhile [ "$1" != env ]; do shift; done\nexec "$@"\n')
    (folder / "bin" / "python").write_text(
        "#!/bin/sh\nwhile read line; do case $line in SigBlk*) echo $line > mask;; esac; done < /proc/$$/status\n"
    )
    (folder / "bin" / "python").chmod(0o700)
    assert run_batch(script(slurm_python="python", requeue_signal=name), folder) == 0
    mask = int((folder / "mask").read_text().split()[1], 16)
    assert {number for number in signal.valid_signals() if mask >> (number - 1) & 1} == {signal.Signals[f"SIG{name}"], signal.SIGTERM}


@pytest.mark.parametrize("body", ['echo "unrecognized option" >&2; exit 125', None], ids=["old", "none"])
def test_where_env_cannot_block_signals_python_is_started_as_it_is(folder: Path, body: str | None) -> None:
    (folder / "bin" / "env").unlink()
    if body is not None:
        (folder / "bin" / "env").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / "env").chmod(0o700)
    assert seen_by_srun(script(), folder)[7] == sys.executable
