"""The one tree of errors.

Each error is also the builtin a caller would expect, so ``except OSError`` and ``except HpcckptError`` both work::

    HpcckptError
    ├── ConfigError               (ValueError)         a configuration that cannot be meant
    ├── TaskEnvironmentError      (ValueError)         the launcher's variables contradict each other
    ├── RunDirectoryError         (OSError)            the run directory cannot be used
    ├── SchedulerError            (OSError)            a Slurm command failed
    │   ├── SubmissionError                            sbatch refused the job
    │   └── RequeueForbiddenError                      Slurm allows no requeue of this job
    ├── RendezvousError           (TimeoutError)       the ranks did not find each other
    ├── AgreementError            (TimeoutError)       the ranks did not agree where to stop
    ├── RankFailedError           (RuntimeError)       another rank raised; its message is passed on
    ├── UsageError                (RuntimeError)       run.* called in an order that cannot work
    ├── FencedError               (OSError)            a newer attempt owns the run directory
    └── CheckpointError
        ├── CheckpointNotFoundError  (FileNotFoundError)
        ├── CheckpointCorruptError   (ValueError)      bytes differ from what was committed
        ├── CheckpointMismatchError  (ValueError)      the file does not fit the objects
        └── CheckpointSaveError      (OSError)         nothing older was touched

Every message says what, where, and what to do next.
"""


class HpcckptError(Exception):
    """Base of all errors raised on purpose by hpcckpt."""


class ConfigError(HpcckptError, ValueError):
    """A configuration that cannot be meant."""


class TaskEnvironmentError(HpcckptError, ValueError):
    """The launcher's environment variables are missing or contradict each other."""


class RunDirectoryError(HpcckptError, OSError):
    """The run directory cannot be used."""


class SchedulerError(HpcckptError, OSError):
    """A Slurm command is missing, failed or did not answer."""


class SubmissionError(SchedulerError):
    """The scheduler refused the job; its own message is passed on."""


class RequeueForbiddenError(SchedulerError):
    """Slurm allows no requeue of this job; its own message is passed on."""


class RendezvousError(HpcckptError, TimeoutError):
    """The ranks did not find each other in time."""


class AgreementError(HpcckptError, TimeoutError):
    """The ranks did not agree in time at which step to stop."""


class RankFailedError(HpcckptError, RuntimeError):
    """Another rank failed at something all ranks do together."""


class UsageError(HpcckptError, RuntimeError):
    """A method of Run was called at a time when it cannot work."""


class FencedError(HpcckptError, OSError):
    """A newer attempt owns the run directory; this one must not touch it any more."""


class CheckpointError(HpcckptError):
    """Base of what can go wrong with a checkpoint."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint asked for is not there."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """The bytes of a checkpoint are not those that were committed."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint does not fit the objects it is loaded into."""


class CheckpointSaveError(CheckpointError, OSError):
    """A checkpoint could not be written; everything older is intact."""
