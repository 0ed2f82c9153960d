"""What submitit runs on every rank.

The pickle holds the run directory and nothing else: Slurm runs it again as it lies on disk after a node failure or a
requeue, days later, so whatever else it held would be stale.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcckpt import config as configuration
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import ConfigError
from hpcckpt.layout import RunLayout
from hpcckpt.signals import SignalLatch
from hpcckpt.store.ledger import Ledger


@dataclass(frozen=True)
class RankTask:
    """The callable of one run; picklable by reference."""

    run_dir: str

    def __call__(self) -> None:
        """Train on this rank; every rank calls it.

        Raises:
            SystemExit: the attempt was stopped and saved.
            Exception: whatever the training raised, so that submitit and Slurm see a failed task.
        """
        # First of all: behind it are submitit's handlers, which requeue or fail the job, and torch takes seconds to import.
        latch = SignalLatch(("USR1", "USR2", "TERM"))
        latch.install()
        try:
            layout = RunLayout(Path(self.run_dir))
            config = configuration.resolve(configuration.load(layout.config), str(layout.config))
            task = TaskEnvironment.from_environ(os.environ)
            task.check_against(config.slurm.nodes, config.slurm.tasks_per_node)
            try:
                main = import_entrypoint(config.entrypoint)
            except Exception as error:
                # A Run would say so, but there is none yet; and what imports on a login node need not do so here.
                Ledger(layout.events).append("failed", rank=task.rank, error=f"{type(error).__name__}: {error}")
                raise
            from hpcckpt.attempt import Launched
            from hpcckpt.run import Run

            with Run(layout, config, task, Launched(latch, lambda successor: adopt(layout, str(task.job_id), successor))) as run:
                main(run)
        finally:
            latch.ignore()


def adopt(layout: RunLayout, job_id: str, successor: str) -> None:
    """Lay down what a successor of a job's batch script runs, if submitit started that: it looks for it under the job's own id."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    if JobPaths(layout.logs, job_id).submitted_pickle.exists():
        DelayedSubmission(RankTask(str(layout.root))).dump(JobPaths(layout.logs, successor).submitted_pickle)


def import_entrypoint(entrypoint: str) -> Callable[[Any], None]:
    """Return the function that `package.module:function` names; the working directory is searched too.

    Raises:
        ConfigError: there is no such module or function, or it cannot be called. Errors inside the module pass through.
    """
    module_name, _, function_name = entrypoint.partition(":")
    # What `python -m` does, and what a console script or PYTHONSAFEPATH does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the entrypoint's module imports
        raise ConfigError(
            f"entrypoint: {entrypoint}: there is no module {error.name} in {os.getcwd()} or among the installed packages"
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        raise ConfigError(f"entrypoint: {entrypoint}: {module.__file__} has no function {function_name}")
    if not callable(function):
        raise ConfigError(f"entrypoint: {entrypoint}: {function_name} is a {type(function).__name__}, which cannot be called")
    checked: Callable[[Any], None] = function
    return checked
