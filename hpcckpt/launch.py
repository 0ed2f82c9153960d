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
from typing import TYPE_CHECKING, Literal

from omegaconf import DictConfig, OmegaConf

from hpcckpt import config as configuration
from hpcckpt import scheduler
from hpcckpt.config import ResumeConfig, RunConfig
from hpcckpt.environment import submission_environ
from hpcckpt.errors import ConfigError, RunDirectoryError, SchedulerError, SubmissionError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory, write_bytes
from hpcckpt.store.ledger import Ledger
from hpcckpt.task import RankTask

if TYPE_CHECKING:
    from submitit.core.core import Executor

Cluster = Literal["slurm", "local"]
IMPORT_TIMEOUT_S = 300.0
_CHECK_ENTRYPOINT = "import sys; from hpcckpt.task import import_entrypoint as f; f(sys.argv[1])"
# The last event of an attempt that another attempt of the same job follows.
_GOES_ON = "requeue"


@dataclass(frozen=True)
class Submitted:
    """A job that was started."""

    job_id: str
    cluster: Cluster
    layout: RunLayout


def choose_cluster(config: RunConfig) -> Cluster:
    """Return where the job runs: `cluster`, or for auto Slurm where sbatch is on PATH."""
    if config.cluster == "auto":
        return "slurm" if scheduler.has_slurm() else "local"
    return "slurm" if config.cluster == "slurm" else "local"


def batch_script(config: RunConfig) -> str:
    """Return the batch script that would be submitted; writes nothing into the run directory.

    Raises:
        ConfigError: this cluster cannot do what is asked.
    """
    layout = layout_of(config)
    if choose_cluster(config) == "local":
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(layout.logs)]
        lines = [*config.slurm.setup, f"# {config.slurm.tasks_per_node} times, side by side, on this machine:", shlex.join(command)]
        return "\n".join(["#!/bin/bash", *lines, ""])
    executor = _slurm_executor(config, layout)
    script: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")  # noqa: SLF001 - submitit has no public way
    return script


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
        SubmissionError, SchedulerError: Slurm refused or did not answer; the run directory is as it was.
    """
    config = configuration.resolve(merged, where)
    cluster = choose_cluster(config)
    layout = layout_of(config)
    script = _checked_script(config, cluster, where)
    ledger = Ledger(layout.events)
    _refuse_if_in_use(layout, ledger)
    store = CheckpointStore(layout, _retention(config))
    resume.check(store, config.resume)
    check_entrypoint(config, where)
    if cluster == "slurm":
        scheduler.check_script(script)
    make_private_directory(layout.root)
    make_private_directory(layout.logs)
    make_private_directory(layout.checkpoints)
    with _restored_on_failure(layout.config), _restored_on_failure(layout.resume_request):
        resume.ask(layout, store, config.resume)
        # Without the request: it is applied once, and a copy of this file must not ask again.
        stored = OmegaConf.merge(merged, {"resume": ResumeConfig()})
        assert isinstance(stored, DictConfig)
        write_bytes(layout.config, configuration.dump(stored).encode())
        job_id = _start_local(config, layout) if cluster == "local" else _start_slurm(config, layout)
    ledger.append("submitted", job_id=job_id, cluster=cluster)
    return Submitted(job_id, cluster, layout)


def check_entrypoint(config: RunConfig, where: str) -> None:
    """Import the entrypoint in another process, as the job will.

    Raises:
        ConfigError: it does not import or is not callable; the last line of the traceback is passed on.
    """
    if config.slurm.python is not None:
        return  # another Python, perhaps in a container that is not there on a login node
    argv = [sys.executable, "-c", _CHECK_ENTRYPOINT, config.entrypoint]
    done = scheduler.run_command(argv, environ={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout_s=IMPORT_TIMEOUT_S)
    if done.returncode != 0:
        last = done.stderr.splitlines()[-1] if done.stderr else f"python ended with {done.returncode}"
        problem = last.removeprefix("hpcckpt.errors.ConfigError: ").removeprefix("entrypoint: ")
        raise ConfigError(f"{where}: entrypoint: {problem} (tried from {os.getcwd()}); mend entrypoint or the module")


def last_event(layout: RunLayout) -> dict[str, object]:
    """Return the newest event of a run; {} without any."""
    events = Ledger(layout.events).events()
    return events[-1] if events else {}


def follow(job: Submitted, show: Callable[[str], None]) -> bool:
    """Pass on what rank 0 prints until a local run ends; returns whether it finished.

    Raises:
        KeyboardInterrupt: the user stops watching; the run goes on.
    """
    log = layout_log(job)
    offset = 0
    while True:
        running = is_running_here(job.job_id)
        with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(offset)
            text = file.read()
            offset += len(text)
            if text:
                show(text.decode(errors="replace"))
        if not running:
            return last_event(job.layout).get("event") == "finished"
        time.sleep(0.1)


def layout_log(job: Submitted) -> Path:
    """Return rank 0's log of a job: standard output, and on this machine standard error too."""
    return job.layout.logs / f"{job.job_id}_0_log.out"


def is_running_here(job_id: str) -> bool:
    """Return whether a local job's controller runs; a zombie does not."""
    try:
        status = Path(f"/proc/{int(job_id)}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def _retention(config: RunConfig) -> Retention:
    checkpoint = config.checkpoint
    return Retention(checkpoint.keep_last, checkpoint.keep_best, checkpoint.keep_every_epochs, checkpoint.monitor, checkpoint.mode)


def _checked_script(config: RunConfig, cluster: Cluster, where: str) -> str:
    if cluster == "local" and config.slurm.nodes != 1:
        raise ConfigError(f"{where}: slurm.nodes: {config.slurm.nodes} nodes need Slurm, and sbatch is not used here (cluster={config.cluster}); set slurm.nodes=1")
    if cluster == "slurm" and not scheduler.has_slurm():
        raise ConfigError(f"{where}: cluster: slurm is asked for, but sbatch is not on PATH; submit from a login node, or use cluster=local")
    return batch_script(config)


def _refuse_if_in_use(layout: RunLayout, ledger: Ledger) -> None:
    submitted = [event for event in ledger.events() if event.get("event") == "submitted"]
    if not submitted:
        return
    job_id, cluster = str(submitted[-1]["job_id"]), submitted[-1]["cluster"]
    if cluster == "local":
        live = last_event(layout).get("event") not in ("finished", "failed", "ended", "left") and is_running_here(job_id)
    else:
        live = scheduler.has_slurm() and scheduler.is_live(job_id)
    if live:
        how = f"kill {job_id}" if cluster == "local" else f"scancel {job_id}"
        raise RunDirectoryError(f"{layout.root}: job {job_id} still waits or runs in this run directory; wait for it, end it with `{how}`, or set another run_dir")


def _slurm_executor(config: RunConfig, layout: RunLayout) -> "Executor":
    # Read when submitit is imported; the handlers it installs are replaced by ours, but must be for the same signal.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
    import submitit  # noqa: PLC0415 - not on the way to --help

    slurm = config.slurm
    executor = submitit.SlurmExecutor(layout.logs, python=None if slurm.python is None else shlex.join(shlex.split(slurm.python)))
    options: dict[str, object] = {"requeue": True, "signal": f"{config.requeue.signal}@{config.requeue.lead_time_s}"}
    if not config.requeue.enabled:
        del options["requeue"]
        options["no-requeue"] = True
    if slurm.reservation is not None:
        options["reservation"] = slurm.reservation
    if slurm.mem_gb is not None:  # submitit rounds to whole GB
        options["mem"] = f"{round(slurm.mem_gb * 1024)}M"
    options |= {key.replace("_", "-"): value for key, value in slurm.extra.items()}
    executor.update_parameters(
        job_name=config.name,
        nodes=slurm.nodes,
        ntasks_per_node=slurm.tasks_per_node,
        gpus_per_node=slurm.gpus_per_node or None,
        cpus_per_task=slurm.cpus_per_task,
        time=slurm.time_min,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        gres=slurm.gres,
        exclude=slurm.exclude,
        dependency=slurm.dependency,
        comment=slurm.comment,
        mail_type=slurm.mail_type,
        mail_user=slurm.mail_user,
        setup=list(slurm.setup),
        # One failing rank ends the step, instead of the others waiting for it until the time limit. From Slurm 22.05 on
        # srun does not take the CPUs per task over from sbatch.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={slurm.cpus_per_task}"],
        wckey=None,
        additional_parameters=options,
    )
    return executor


def _start_slurm(config: RunConfig, layout: RunLayout) -> str:
    executor = _slurm_executor(config, layout)
    with _environ_for_submission():
        from submitit.core.utils import FailedJobError, FailedSubmissionError  # noqa: PLC0415 - as above

        try:
            return str(executor.submit(RankTask(str(layout.root))).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or [str(error)]
            raise SubmissionError(f"sbatch refused the job: {' '.join(said)}") from None


def _start_local(config: RunConfig, layout: RunLayout) -> str:
    """Start a local job in a session of its own, so that neither Ctrl-C nor a closed terminal ends it.

    submitit's controller starts tasks anew at most five times, so a parent process starts further controllers as long as
    the run wants to go on.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        _supervise(config, layout, writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        outcome, _, text = pipe.read().partition(":")
    if outcome != "started":
        raise SchedulerError(f"the local job could not be started: {text or 'its first process ended'}")
    return text


def _supervise(config: RunConfig, layout: RunLayout, writer: int) -> None:
    """Be the parent of local controllers; never returns. Runs in a forked process."""
    code = 1
    try:
        os.setsid()
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
        # Threads of the login process's Python would not have survived the fork; it has none.
        job_id = _one_local_job(config, layout)
        os.write(writer, f"started:{job_id}".encode())
        os.close(writer)
        with open(os.devnull, "r+b") as null:
            for descriptor in (0, 1, 2):
                os.dup2(null.fileno(), descriptor)
        while True:
            os.waitpid(int(job_id), 0)
            if last_event(layout).get("event") != _GOES_ON:
                break
            job_id = _one_local_job(config, layout)
            Ledger(layout.events).append("resubmitted", job_id=job_id)
        code = 0
    except BaseException as error:  # the only way out of a forked process is _exit
        with contextlib.suppress(OSError):
            os.write(writer, f"failed:{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _one_local_job(config: RunConfig, layout: RunLayout) -> str:
    import submitit  # noqa: PLC0415 - as above

    executor = submitit.LocalExecutor(layout.logs)
    executor.update_parameters(
        tasks_per_node=config.slurm.tasks_per_node,
        gpus_per_node=config.slurm.gpus_per_node,
        timeout_min=config.slurm.time_min,
        signal_delay_s=config.requeue.lead_time_s,
        setup=list(config.slurm.setup),
        stderr_to_stdout=True,
    )
    return str(executor.submit(RankTask(str(layout.root))).job_id)


@contextlib.contextmanager
def _environ_for_submission() -> Iterator[None]:
    before = dict(os.environ)
    clean = submission_environ(before)
    for name in before.keys() - clean.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


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
