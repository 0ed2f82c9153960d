"""The submission as a user types it, from a folder with a Slurm that accepts everything."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Submit = Callable[..., "subprocess.CompletedProcess[str]"]
SBATCH = 'case $1 in --test-only) /bin/cat > tested;; *) /bin/cat "$1" > submitted; echo "Submitted batch job 7";; esac'


def write_program(folder: Path, name: str, body: str) -> None:
    """Put a shell script on the PATH of `submit_from`."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / "bin" / name).chmod(0o700)


def make_folder(folder: Path) -> Path:
    """Lay down conf/, a training module, and a Slurm that accepts everything; its jobs have ended."""
    (folder / "conf").mkdir()
    (folder / "conf" / "exp.yaml").write_text("entrypoint: training:main\ncluster: slurm\n")
    (folder / "training.py").write_text("def main(run): pass\n\n\nnumber = 3\n")
    write_program(folder, "sbatch", SBATCH)
    write_program(folder, "srun", "exit 1")
    write_program(folder, "scontrol", "echo JobId=7 JobState=COMPLETED")
    return folder


def submit_from(folder: Path) -> Submit:
    """Return what runs `python -m hpcckpt.submit` in a folder with nothing but its programs on the PATH."""

    def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "hpcckpt.submit", *arguments],
            cwd=folder,
            env={"PATH": str(folder / "bin"), "HOME": str(folder), "LANG": "C.UTF-8", **environ},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def refusal(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """Return the one line on stderr of a command that ended with `code`."""
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
    assert done.stderr.startswith("hpcckpt: ")
    return done.stderr.removeprefix("hpcckpt: ").rstrip("\n")


def contents(root: Path) -> dict[str, bytes | None]:
    """Return every file's bytes, and None for every folder."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
