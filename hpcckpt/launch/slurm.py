"""One job on Slurm through submitit: the batch script, and its submission."""

import contextlib
import io
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcckpt.config import RunConfig
from hpcckpt.environment import submission_environ
from hpcckpt.errors import ConfigError, SubmissionError
from hpcckpt.layout import RunLayout
from hpcckpt.task import RankTask

if TYPE_CHECKING:
    from submitit import SlurmExecutor

# Keys that submitit and sbatch know under the same name.
_AS_IN_SBATCH = (
    "partition", "account", "qos", "constraint", "gres", "exclude", "dependency", "comment", "mail_type", "mail_user"
)  # fmt: skip


def batch_script(config: RunConfig, layout: RunLayout) -> str:
    """Return the batch script of a run; writes nothing."""
    executor = _executor(config, layout)
    # submitit writes the script only as it submits it.
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")  # noqa: SLF001


def _executor(config: RunConfig, layout: RunLayout) -> "SlurmExecutor":
    # Read when submitit is imported; the handlers it installs are replaced by ours, but must be for the same signal.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
    import submitit

    slurm = config.slurm
    executor = submitit.SlurmExecutor(layout.logs, python=None if slurm.python is None else _quoted(slurm.python))
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
        **{name: getattr(slurm, name) for name in _AS_IN_SBATCH},
        setup=list(slurm.setup),
        # One failing rank ends the step, instead of the others waiting for it until the time limit. From Slurm 22.05 on
        # srun does not take the CPUs per task over from sbatch.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={slurm.cpus_per_task}"],
        wckey=None,
        additional_parameters=options,
    )
    return executor


def _quoted(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"slurm.python: {command!r} is not a command ({error}); mend its quotes") from None
    if not words:
        raise ConfigError("slurm.python: is empty; write a command, or null for this Python")
    return shlex.join(words)


def start(config: RunConfig, layout: RunLayout) -> str:
    """Submit; returns the job id.

    Raises:
        SubmissionError: sbatch refused; its own message is passed on.
    """
    executor = _executor(config, layout)
    # submitit prints sbatch's words on stderr, too; they are in the exception.
    with _environ_for_submission(), contextlib.redirect_stderr(io.StringIO()):
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            return str(executor.submit(RankTask(str(layout.root))).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or [str(error)]
            raise SubmissionError(f"sbatch refused the job: {' '.join(said)}") from None


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
