"""From a configuration to a job. Sole owner of submitit.

Slurm and this machine are the same to the caller: `check` checks, and `start` writes `config.yaml`, starts the job and returns
its id. Nothing is written before everything that can be checked was checked, and a refused job leaves what was there.
"""

import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from omegaconf import DictConfig, OmegaConf

from hpcckpt import config as configuration
from hpcckpt import scheduler
from hpcckpt.config import ResumeConfig, RunConfig
from hpcckpt.environment import node_range
from hpcckpt.errors import ConfigError, RunDirectoryError, SchedulerError, SubmissionError
from hpcckpt.launch import local, slurm
from hpcckpt.launch.sweep import Point, expand, naming
from hpcckpt.layout import RunLayout
from hpcckpt.lead_time import check_lead_time
from hpcckpt.policy import current_job, outcome
from hpcckpt.signals import children_protected
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory, write_bytes
from hpcckpt.store.ledger import Ledger

__all__ = [
    "Point", "Ready", "Submitted", "batch_script", "check", "check_entrypoint", "choose_cluster", "expand", "follow", "how_to_end",
    "layout_of", "newest_log", "rank_0_log", "start",
]  # fmt: skip

Cluster = Literal["slurm", "local"]
IMPORT_TIMEOUT_S = 300.0
# The mark at the end: a module that ends the process as it is imported may do so with exit code 0.
_IMPORTED = "hpcckpt: imported"
_CHECK_ENTRYPOINT = f"import sys; from hpcckpt.task import import_entrypoint as f; f(sys.argv[1]); print({_IMPORTED!r})"


@dataclass(frozen=True)
class Ready:
    """A run that everything was checked of that can be checked here; nothing is written yet."""

    point: Point
    config: RunConfig
    layout: RunLayout
    store: CheckpointStore
    ledger: Ledger
    # What the user should know all the same.
    warning: str | None = None


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


def batch_script(configs: Sequence[RunConfig], where: str) -> str:
    """Return the batch script that would be submitted for a run, or for all points of a sweep; writes nothing. `where`: for messages.

    Raises:
        ConfigError: this cluster cannot do what is asked.
    """
    config, layouts = configs[0], [layout_of(config) for config in configs]
    cluster = choose_cluster(config)
    _check_cluster(config, cluster, where)
    if cluster == "slurm":
        return slurm.batch_script(config, layouts)
    commands = [shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(layout.logs)]) for layout in layouts]
    lines = [*config.slurm.setup, f"# {config.slurm.tasks_per_node} times, side by side, on this machine:", *commands]
    return "\n".join(["#!/bin/bash", *lines, ""])


def layout_of(config: RunConfig) -> RunLayout:
    """Return the paths of the run; relative to the working directory, which is also the job's."""
    return RunLayout(Path(config.run_dir).expanduser().absolute())


def check(points: Sequence[Point], where: str) -> list[Ready]:
    """Check everything that can be checked here, of one run or of all points of a sweep; writes nothing.

    Args:
        points: their configurations as `hpcckpt.config.load` returned them.
        where: the file, for messages.

    Raises:
        ConfigError, RunDirectoryError, CheckpointError: bad input.
        SubmissionError, SchedulerError: Slurm would refuse the job, or did not answer.
    """
    configs = [configuration.resolve(point.merged, where) for point in points]
    script = batch_script(configs, where)
    runs = []
    for point, config in zip(points, configs, strict=True):
        with naming(point.own):
            runs.append(_ready(point, config, where))
    for entrypoint, config in {config.entrypoint: config for config in configs}.items():
        with naming([f"entrypoint={entrypoint}"] if len({config.entrypoint for config in configs}) > 1 else []):
            check_entrypoint(config, where)
    if choose_cluster(configs[0]) == "slurm":
        scheduler.check_script(script)
    return runs


def _ready(point: Point, config: RunConfig, where: str) -> Ready:
    layout = layout_of(config)
    _check_run_dir(layout.root)
    ledger = Ledger(layout.events)
    _refuse_if_in_use(layout, ledger)
    store = CheckpointStore.configured(layout, config.checkpoint)
    resume.check(store, config.resume)
    if not config.requeue.enabled or choose_cluster(config) == "local":
        return Ready(point, config, layout, store, ledger)
    lead = check_lead_time(ledger.events(), lead_time_s=config.requeue.lead_time_s, time_min=config.slurm.time_min)
    if lead.refusal is not None:
        raise ConfigError(f"{where}: {lead.refusal}")
    return Ready(point, config, layout, store, ledger, lead.warning)


def start(runs: Sequence[Ready], announce: Callable[[Sequence[Submitted]], None]) -> list[Submitted]:
    """Start one run, here or on Slurm, or several as one array of Slurm; `announce` is told as soon as the ledgers have it.

    Signals that would end this process are held back from just before sbatch until then: a job that runs is known.

    Raises:
        SubmissionError: Slurm refused; what the run directories held is as it was.
        SchedulerError: Slurm did not answer, or the local job could not be started.
    """
    cluster = choose_cluster(runs[0].config)
    for run in runs:
        for folder in (run.layout.root, run.layout.logs, run.layout.checkpoints):
            make_private_directory(folder)
    known = [len(run.ledger.events()) for run in runs]
    # Not around a local job, whose processes would inherit it.
    with children_protected(("INT", "TERM", "HUP")) if cluster == "slurm" else contextlib.nullcontext():
        with contextlib.ExitStack() as undo:
            for run in runs:
                _write(run, undo)
            started: list[tuple[str, str | None]]
            if cluster == "slurm":
                started = [(job_id, None) for job_id in _start_on_slurm(runs)]
            else:
                started = [local.start(run.config, run.layout) for run in runs]
        jobs = []
        for run, (job_id, supervisor), skip in zip(runs, started, known, strict=True):
            run.ledger.append("submitted", job_id=job_id, cluster=cluster, supervisor=supervisor, host=socket.gethostname())
            jobs.append(Submitted(job_id, cluster, run.layout, supervisor, skip))
        announce(jobs)
    return jobs


def _write(run: Ready, undo: contextlib.ExitStack) -> None:
    """Lay down what the job reads; `undo` puts back what was there."""
    undo.enter_context(_restored_on_failure(run.layout.config))
    undo.enter_context(_restored_on_failure(run.layout.resume_request))
    resume.ask(run.layout, run.store, run.config.resume)
    # Without the request: it is applied once, and a copy of this file must not ask again.
    run.layout.stop.unlink(missing_ok=True)  # whoever submits wants it to run
    stored = cast(DictConfig, OmegaConf.merge(run.point.merged, {"resume": ResumeConfig()}))
    write_bytes(run.layout.config, configuration.dump(stored).encode())


def _start_on_slurm(runs: Sequence[Ready]) -> list[str]:
    config, layouts = runs[0].config, [run.layout for run in runs]
    script, text = slurm.new_script(layouts[0]), slurm.batch_script(config, layouts)
    with contextlib.ExitStack() as undo:
        for run in runs:
            # What was refused leaves no trace; what was not answered does.
            undo.enter_context(_restored_on_failure(run.layout.events, SubmissionError))
            run.ledger.append("submitting", script=str(script))
        return slurm.start(config, layouts, script, text)


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
    if cluster == "local" and node_range(config.slurm.nodes)[0] != 1:
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
    events = ledger.events()
    job, found, how = current_job(events), None, ""
    last = next((event for event in reversed(events) if event.get("event") in ("submitting", "submitted", "successor")), None)
    if last is not None and last["event"] == "submitting" and scheduler.has_slurm():  # it was cut off, or got no answer
        found = slurm.job_of(str(last.get("script")))
    if found is None and job is not None:
        job_id, supervisor = str(job.get("job_id")), job.get("supervisor")
        if supervisor is not None:
            if local.is_running(supervisor):
                found, how = local.job_ids(layout)[-1], local.how_to_end(supervisor)
        elif scheduler.has_slurm() and scheduler.is_live(job_id):
            found = job_id
    if found is not None:
        raise RunDirectoryError(
            f"{layout.root}: job {found} still waits or runs in this run directory; wait, end it with `{how or f'scancel {found}'}`, "
            "or set another run_dir"
        )


@contextlib.contextmanager
def _restored_on_failure(path: Path, failure: type[BaseException] = BaseException) -> Iterator[None]:
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except failure:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, before)
        raise
