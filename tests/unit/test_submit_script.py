"""The batch script: what it asks of Slurm, and that nothing in a configuration is run by the shell that reads it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcckpt import config, launch

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
    for name, body in {"srun": 'printf "%s\\n" "$@" > seen; echo "$SUBMITIT_EXECUTOR" > executor', "sbatch": "exit 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")  # put back afterwards
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(**values: object) -> str:
    """Return the script for a configuration with these keys; `slurm_x` is slurm.x."""
    merged = config.parse("entrypoint: a.b:main\ncluster: slurm\n")
    for key, value in values.items():
        section, _, name = key.partition("_")
        holder = merged[section] if section in ("slurm", "requeue") else merged
        holder[name if holder is not merged else key] = value
    checked = config.parse(config.dump(merged), where="exp.yaml")
    return launch.batch_script(config.resolve(checked), "exp.yaml")


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
        "--cpus-per-task=3", sys.executable, "-u", "-m", "submitit.core._submit", logs,
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
    assert seen[7:14] == ["apptainer", "exec", "my image.sif", "python;", "touch", "x", "-u"]
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
    lines = launch.batch_script(config.resolve(merged), "exp.yaml").splitlines()
    assert lines[:2] == ["#!/bin/bash", "export A=1"]
    assert shlex.split(lines[-1]) == [sys.executable, "-u", "-m", "submitit.core._submit", f"{folder}/a b/logs"]
    assert not (folder / "a b").exists()
