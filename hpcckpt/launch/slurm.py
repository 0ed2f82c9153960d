"""One job or one array on Slurm: the batch script as submitit writes it, and its submission."""

import functools
import os
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from hpcckpt import scheduler
from hpcckpt.config import RunConfig
from hpcckpt.environment import submission_environ
from hpcckpt.errors import ConfigError, SchedulerError, SubmissionError
from hpcckpt.layout import RunLayout
from hpcckpt.task import RankTask

# Keys that submitit and sbatch know under the same name.
_AS_IN_SBATCH = (
    "partition", "account", "qos", "constraint", "gres", "exclude", "dependency", "comment", "mail_type", "mail_user"
)  # fmt: skip
# A busy controller takes its time; one that says nothing for so long is down.
SBATCH_TIMEOUT_S = 120.0
PROBE_TIMEOUT_S = 10.0
# `scancel --full --signal=USR1` means the ranks. Bash runs the trap when srun has ended, and gives the default to what it starts.
_SPARED = "trap : USR1 USR2"
_RUN_DIR = '"$hpcckpt_run_dir"'


def batch_script(config: RunConfig, layouts: Sequence[RunLayout]) -> str:
    """Return the batch script of a run, or of several as one array; writes nothing.

    A task of the array finds its run directory in a list, and its logs are there, those of the batch shell included.
    """
    # Read when submitit is imported; the handlers it installs are replaced by ours, but must be for the same signal.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
    import submitit

    is_array = len(layouts) > 1
    slurm = config.slurm
    run_dir = _RUN_DIR if is_array else shlex.quote(str(layouts[0].root))
    executor = submitit.SlurmExecutor(layouts[0].logs)
    options: dict[str, object] = {"requeue": True, "signal": f"{config.requeue.signal}@{config.requeue.lead_time_s}"}
    if not config.requeue.enabled:
        del options["requeue"]
        options["no-requeue"] = True
    if is_array:
        # One pattern cannot name several folders; the script's first lines choose the files.
        options |= {"array": f"0-{len(layouts) - 1}", "output": "/dev/null", "error": "/dev/null"}
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
        **{name: getattr(slurm, name) for name in _AS_IN_SBATCH},
        setup=[*(_chosen(layouts) if is_array else []), _SPARED, *slurm.setup],
        teardown=_teardown(config, run_dir),
        use_srun=False,  # it is in the command, for submitit would quote the shell's variable
        wckey=None,
        additional_parameters=options,
    )
    # submitit writes the script only as it submits it.
    return executor._make_submission_file_text(_srun(config, run_dir, "%A_%a" if is_array else "%j"), "")  # noqa: SLF001


def _chosen(layouts: Sequence[RunLayout]) -> list[str]:
    """Return the lines that choose an array task's run directory, and send what the batch shell says to rank 0's logs."""
    log = f"{_RUN_DIR}/logs/${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_0_log"
    return [
        "hpcckpt_run_dirs=(",
        *(shlex.quote(str(layout.root)) for layout in layouts),
        ")",
        "hpcckpt_run_dir=${hpcckpt_run_dirs[$SLURM_ARRAY_TASK_ID]}",
        f"exec >>{log}.out 2>>{log}.err",
    ]


def _srun(config: RunConfig, run_dir: str, job_id: str) -> str:
    log = f"{run_dir}/logs/{job_id}_%t_log"
    # One failing rank ends the step, instead of the others waiting for it until the time limit. From Slurm 22.05 on
    # srun does not take the CPUs per task over from sbatch.
    options = f"--kill-on-bad-exit=1 --cpus-per-task={config.slurm.cpus_per_task}"
    command = f"{_python(config)} -u -m submitit.core._submit {run_dir}/logs"
    # `||`, for a setup that has said `set -e`.
    return f"hpcckpt_code=0\nsrun --unbuffered --output {log}.out --error {log}.err {options} {command} || hpcckpt_code=$?"


def _teardown(config: RunConfig, run_dir: str) -> list[str]:
    """Return the lines behind srun: what failed is looked after, and may be requeued; the job's exit code says so."""
    after = f'{_python(config)} -m hpcckpt.after {run_dir} "$hpcckpt_code"'
    return ['if [ "$hpcckpt_code" -ne 0 ]; then', f"    {after} && hpcckpt_code=0 || hpcckpt_code=$?", "fi", 'exit "$hpcckpt_code"', ""]


def _python(config: RunConfig) -> str:
    """Return the words that start Python, quoted for the shell; with the signals blocked that would end it before it has latched them."""
    command = sys.executable if config.slurm.python is None else config.slurm.python
    try:
        words = [command] if config.slurm.python is None else shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"slurm.python: {command!r} is not a command ({error}); mend its quotes") from None
    if not words:
        raise ConfigError("slurm.python: is empty; write a command, or null for this Python")
    return shlex.join([*blocking(config.requeue.signal), *words])


@functools.cache
def blocking(signal: str) -> tuple[str, ...]:
    """Return the words that start a command with its signals blocked; none where this machine's coreutils (before 8.31) cannot."""
    words = ("env", f"--block-signal={signal},TERM")
    try:
        return words if scheduler.run_command([*words, "true"], timeout_s=PROBE_TIMEOUT_S).returncode == 0 else ()
    except SchedulerError:
        return ()


def new_script(layout: RunLayout) -> Path:
    """Return a path for a batch script, by which Slurm and later submissions know its job."""
    return layout.logs / f"submission_{uuid.uuid4().hex}.sh"


def start(config: RunConfig, layouts: Sequence[RunLayout], script: Path, text: str) -> list[str]:
    """Submit a batch script of `batch_script`, from the path `script`; returns the job id of each run.

    Raises:
        SubmissionError: sbatch refused; its own message is passed on.
        SchedulerError: sbatch did not answer; whether there is a job is not known.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    pickles = [layout.logs / f"{script.stem}.pkl" for layout in layouts]
    for layout, path in zip(layouts, pickles, strict=True):
        submission = DelayedSubmission(RankTask(str(layout.root)))
        submission.set_timeout(config.slurm.time_min, max_num_timeout=3)
        submission.dump(path)
    script.write_text(text, encoding="utf-8")
    try:
        done = scheduler.run_command(["sbatch", str(script)], environ=submission_environ(os.environ), timeout_s=SBATCH_TIMEOUT_S)
    except SchedulerError as error:
        raise SchedulerError(
            f"{error} The job may have been submitted all the same: look for it with "
            f"`squeue --me --name={shlex.quote(config.name)}`, and end it with scancel before you submit again"
        ) from None
    number = re.search(r"job (\d+)", done.stdout)
    if done.returncode != 0 or number is None:
        for path in (script, *pickles):
            path.unlink()
        said = [line for line in done.stderr.splitlines() if line.startswith("sbatch:")] or [done.stderr or done.stdout or "without a word"]
        raise SubmissionError(f"sbatch refused the job: {' '.join(said)}")
    job_ids = [f"{number[1]}_{index}" for index in range(len(layouts))] if len(layouts) > 1 else [number[1]]
    for layout, job_id, path in zip(layouts, job_ids, pickles, strict=True):
        path.rename(JobPaths(layout.logs, job_id).submitted_pickle)
    script.rename(JobPaths(layouts[0].logs, job_ids[0]).submission_file)
    return job_ids


def job_of(script: str) -> str | None:
    """Return the id of the user's job, still to be run or running, that was submitted from this path; None: there is none.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    done = scheduler.run_command(["squeue", "--me", "--noheader", "--format=%F|%o"])
    if done.returncode != 0:
        raise SchedulerError(f"squeue: {done.stderr or done.returncode}; is Slurm's controller up?")
    jobs = [line.split("|", maxsplit=1) for line in done.stdout.splitlines() if "|" in line]
    return next((job_id for job_id, command in jobs if command == script), None)
