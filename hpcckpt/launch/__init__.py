"""From a configuration to a job. Sole owner of submitit.

Slurm and this machine are one function to the caller: `submit` checks, writes `config.yaml`, starts the job and returns
its id. Nothing is written before everything that can be checked was checked, and a refused job leaves what was there.
"""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from omegaconf import DictConfig, OmegaConf

from hpcckpt import config as configuration
from hpcckpt import scheduler
from hpcckpt.config import ResumeConfig, RunConfig
from hpcckpt.errors import ConfigError, RunDirectoryError, SchedulerError
from hpcckpt.launch import local, slurm
from hpcckpt.layout import RunLayout
from hpcckpt.policy import outcome
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory, write_bytes
from hpcckpt.store.ledger import Ledger

Cluster = Literal["slurm", "local"]
IMPORT_TIMEOUT_S = 300.0
# The mark at the end: a module that ends the process as it is imported may do so with exit code 0.
_IMPORTED = "hpcckpt: imported"
_CHECK_ENTRYPOINT = f"import sys; from hpcckpt.task import import_entrypoint as f; f(sys.argv[1]); print({_IMPORTED!r})"


@dataclass(frozen=True)
class Submitted:
    """A job that was started."""

    job_id: str
    cluster: Cluster
    layout: RunLayout
    # The process that sees a local run through all of its restarts.
    supervisor: str | None = None
    # How many events the ledger held before.
    known_events: int = 0


def choose_cluster(config: RunConfig) -> Cluster:
    """Return where the job runs: `cluster`, or for auto Slurm where sbatch is on PATH."""
    if config.cluster == "auto":
        return "slurm" if scheduler.has_slurm() else "local"
    return "slurm" if config.cluster == "slurm" else "local"


def batch_script(config: RunConfig, where: str) -> str:
    """Return the batch script that would be submitted; writes nothing into the run directory. `where`: for messages.

    Raises:
        ConfigError: this cluster cannot do what is asked.
    """
    layout, cluster = layout_of(config), choose_cluster(config)
    _check_cluster(config, cluster, where)
    if cluster == "local":
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(layout.logs)]
        lines = [*config.slurm.setup, f"# {config.slurm.tasks_per_node} times, side by side, on this machine:", shlex.join(command)]
        return "\n".join(["#!/bin/bash", *lines, ""])
    return slurm.batch_script(config, layout)


def layout_of(config: RunConfig) -> RunLayout:
    """Return the paths of the run; relative to the working directory, which is also the job's."""
    return RunLayout(Path(config.run_dir).expanduser().absolute())


def submit(merged: DictConfig, where: str) -> Submitted:
    """Check everything that can be checked here, then start the job.

    Args:
        merged: the configuration as `hpcckpt.config.load` returned it.
        where: its file, for messages.

    Raises:
        ConfigError, RunDirectoryError, CheckpointError: bad input; nothing was submitted, nothing written over.
        SubmissionError, SchedulerError: Slurm refused or did not answer; what the run directory held is as it was.
    """
    config = configuration.resolve(merged, where)
    cluster = choose_cluster(config)
    layout = layout_of(config)
    script = batch_script(config, where)
    _check_run_dir(layout.root)
    ledger = Ledger(layout.events)
    _refuse_if_in_use(layout, ledger)
    store = CheckpointStore.configured(layout, config.checkpoint)
    resume.check(store, config.resume)
    check_entrypoint(config, where)
    if cluster == "slurm":
        scheduler.check_script(script)
    make_private_directory(layout.root)
    make_private_directory(layout.logs)
    make_private_directory(layout.checkpoints)
    known_events = len(ledger.events())
    with _restored_on_failure(layout.config), _restored_on_failure(layout.resume_request):
        resume.ask(layout, store, config.resume)
        # Without the request: it is applied once, and a copy of this file must not ask again.
        stored = cast(DictConfig, OmegaConf.merge(merged, {"resume": ResumeConfig()}))
        write_bytes(layout.config, configuration.dump(stored).encode())
        job_id, supervisor = local.start(config, layout) if cluster == "local" else (slurm.start(config, layout), None)
    ledger.append("submitted", job_id=job_id, cluster=cluster, supervisor=supervisor)
    return Submitted(job_id, cluster, layout, supervisor, known_events)


def check_entrypoint(config: RunConfig, where: str) -> None:
    """Import the entrypoint in another process, as the job will.

    Raises:
        ConfigError: it does not import or is not callable; the last line of the traceback is passed on.
    """
    if config.slurm.python is not None:
        return  # another Python, perhaps in a container that is not there on a login node
    argv = [sys.executable, "-c", _CHECK_ENTRYPOINT, config.entrypoint]
    try:
        done = scheduler.run_command(argv, environ={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout_s=IMPORT_TIMEOUT_S)
    except SchedulerError:
        raise ConfigError(f"{where}: entrypoint: {config.entrypoint} took more than {IMPORT_TIMEOUT_S:g} s to import; mend it") from None
    if done.returncode != 0 or _IMPORTED not in done.stdout:
        last = done.stderr.splitlines()[-1] if done.stderr else f"python ended with {done.returncode} while importing it"
        problem = last.removeprefix("hpcckpt.errors.ConfigError: ").removeprefix("entrypoint: ")
        raise ConfigError(f"{where}: entrypoint: {problem} (tried from {os.getcwd()}); mend entrypoint or the module")


def follow(job: Submitted, show: Callable[[str], None]) -> tuple[str, str]:
    """Pass on what rank 0 prints until a local run ends; returns its outcome, "finished" or another word, and why.

    Raises:
        KeyboardInterrupt: the user stops watching; the run goes on.
    """
    shown: dict[str, int] = {}
    while True:
        running = job.supervisor is not None and local.is_running(job.supervisor)
        for job_id in local.job_ids(job.layout):
            shown[job_id] = shown.get(job_id, 0) + _show_from(rank_0_log(job.layout, job_id), shown.get(job_id, 0), show)
        if not running:
            return outcome(Ledger(job.layout.events).events(job.known_events))
        time.sleep(0.1)


def rank_0_log(layout: RunLayout, job_id: str) -> Path:
    """Return rank 0's log of a job: standard output, and on this machine standard error too."""
    return layout.logs / f"{job_id}_0_log.out"


def how_to_end(job: Submitted) -> str:
    """Return the command that ends a job, saved and not requeued."""
    return f"scancel {job.job_id}" if job.supervisor is None else local.how_to_end(job.supervisor)


def newest_log(job: Submitted) -> tuple[str, Path]:
    """Return the id that a local run's newest job has by now, and rank 0's log of it."""
    job_id = [job.job_id, *local.job_ids(job.layout)][-1]
    return job_id, rank_0_log(job.layout, job_id)


def _show_from(log: Path, offset: int, show: Callable[[str], None]) -> int:
    """Show what a log holds behind `offset`, and return how many bytes that was."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return 0
    if text:
        show(text.decode(errors="replace"))
    return len(text)


def _check_cluster(config: RunConfig, cluster: Cluster, where: str) -> None:
    if cluster == "local" and config.slurm.nodes != 1:
        raise ConfigError(
            f"{where}: slurm.nodes: {config.slurm.nodes} nodes need Slurm, and cluster={config.cluster} means this machine; "
            "set slurm.nodes=1, or submit from a login node"
        )
    if cluster == "slurm" and not scheduler.has_slurm():
        raise ConfigError(
            f"{where}: cluster: slurm is asked for, but sbatch and srun are not on PATH; submit from a login node, or set cluster=local"
        )


def _check_run_dir(root: Path) -> None:
    """Refuse a run directory that could not be made or written to, before anything is."""
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise RunDirectoryError(f"{root}: {there} is no directory; choose another run_dir")
    if there == root and there.stat().st_uid != os.geteuid():
        raise RunDirectoryError(f"{root}: belongs to user {there.stat().st_uid}, not to you; choose another run_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"{root}: {there} is not writable; choose another run_dir, or mend its mode")


def _refuse_if_in_use(layout: RunLayout, ledger: Ledger) -> None:
    submitted = [event for event in ledger.events() if event.get("event") == "submitted"]
    if not submitted:
        return
    job_id, supervisor = str(submitted[-1]["job_id"]), submitted[-1].get("supervisor")
    if supervisor is not None:
        live, job_id = local.is_running(supervisor), local.job_ids(layout)[-1]
    else:
        live = scheduler.has_slurm() and scheduler.is_live(job_id)
    if live:
        how = f"scancel {job_id}" if supervisor is None else local.how_to_end(supervisor)
        raise RunDirectoryError(
            f"{layout.root}: job {job_id} still waits or runs in this run directory; wait, end it with `{how}`, or set another run_dir"
        )


@contextlib.contextmanager
def _restored_on_failure(path: Path) -> Iterator[None]:
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, before)
        raise
