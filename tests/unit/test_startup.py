"""What a login node's command waits for: never for torch, and for --help not even for the configuration's library."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hpcckpt.store.durable import write_json

SLOW = ("torch", "numpy")
COMMAND = f"{sysconfig.get_path('scripts')}/hpcckpt"
# sbatch --test-only accepts everything; nothing here is submitted.
PROGRAMS = ("sbatch", "srun", "scontrol")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a configuration, and a PATH on which Slurm's commands do nothing."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "x.yaml").write_text("entrypoint: training:main\n")
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o700)
    return tmp_path


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """Run a Python and return the top-level names of everything that it imported."""
    environ = {"PATH": str(folder / "bin"), "HOME": str(folder), "LANG": "C.UTF-8"}
    argv = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {name.partition(".")[0] for name in lines}


def test_importing_the_package_imports_next_to_nothing(folder: Path) -> None:
    assert not imported_by(folder, "-c", "import hpcckpt; hpcckpt.errors; hpcckpt.TaskEnvironment") & {
        *SLOW,
        "omegaconf",
        "submitit",
        "yaml",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-m", "hpcckpt.submit", "--help"], id="python -m hpcckpt.submit --help"),
        pytest.param([COMMAND, "--help"], id="hpcckpt --help"),
        pytest.param([COMMAND, "submit", "--help"], id="hpcckpt submit --help"),
        pytest.param([COMMAND, "status", "--help"], id="hpcckpt status --help"),
    ],
)
def test_help_waits_for_no_library(folder: Path, arguments: list[str]) -> None:
    assert not imported_by(folder, *arguments) & {*SLOW, "omegaconf", "submitit", "yaml", "filelock"}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--print-config", "conf=x"], id="print-config"),
        pytest.param(["--dry-run", "conf=x", "cluster=slurm"], id="dry-run on Slurm"),
        pytest.param(["--dry-run", "conf=x", "cluster=local"], id="dry-run on this machine"),
    ],
)
def test_looking_before_submitting_does_not_wait_for_torch(folder: Path, arguments: list[str]) -> None:
    imported = imported_by(folder, "-m", "hpcckpt.submit", *arguments)
    assert "omegaconf" in imported
    assert not imported & set(SLOW)


def test_asking_how_runs_are_doing_waits_neither_for_torch_nor_for_submitit(folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "events.jsonl").write_text('{"event": "submitted", "job_id": "7", "cluster": "slurm"}\n')
    write_json(folder / "run" / "checkpoints" / "latest.json", {"file": "x.pt"})
    assert not imported_by(folder, COMMAND, "status", ".") & {*SLOW, "submitit"}


def test_submitting_itself_does_not_import_torch_where_the_training_does_not(folder: Path) -> None:
    (folder / "training.py").write_text("def main(run): pass\n")
    (folder / "bin" / "sbatch").write_text('#!/bin/sh\ncase $1 in --test-only) ;; *) echo "Submitted batch job 7";; esac\n')
    assert not imported_by(folder, "-m", "hpcckpt.submit", "conf=x", "cluster=slurm") & set(SLOW)


def test_the_run_itself_is_exported_and_needs_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, hpcckpt; hpcckpt.Run; print('torch' in sys.modules)"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "True\n"
