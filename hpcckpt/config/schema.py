"""The typed schema: sections, keys, defaults. Every key is documented in docs/reference/configuration.md."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import MISSING

# `from` cannot be an attribute in Python.
KEY_OF_FIELD = {"from_": "from"}
FIELD_OF_KEY = {key: name for name, key in KEY_OF_FIELD.items()}


@dataclass
class SlurmConfig:
    """What is asked of Slurm; the local launcher uses tasks_per_node, gpus_per_node, cpus_per_task, time_min and setup."""

    # A number, or a range as "2-4".
    nodes: int | str = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: float | None = None
    time_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    comment: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class CheckpointConfig:
    """When to save and what to keep."""

    every_epochs: int = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    keep_last: int = 3
    keep_best: int = 1
    keep_every_epochs: int | None = None
    monitor: str | None = None
    mode: str = "min"
    async_save: bool = True
    staging: str = "eager"
    when_busy: str = "wait"
    writers: str = "rank0"
    locking: str = "flock"


@dataclass
class RequeueConfig:
    """How a run goes on after a warning signal, and when it gives up."""

    enabled: bool = True
    signal: str = "USR1"
    lead_time_s: int = 120
    max_requeues: int = 100
    max_stalled: int = 3
    on_failure: int = 0


@dataclass
class ResumeConfig:
    """Where a submission goes on from."""

    from_: str = "latest"
    epoch: int | None = None
    step: int | None = None
    weights_only: bool = False
    strict: bool = True


@dataclass
class RunConfig:
    """Everything about a run."""

    name: str = MISSING
    run_dir: str = "runs/${name}"
    entrypoint: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)
    cluster: str = "auto"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    requeue: RequeueConfig = field(default_factory=RequeueConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    seed: int = 0


SECTIONS = {"slurm": SlurmConfig, "checkpoint": CheckpointConfig, "requeue": RequeueConfig, "resume": ResumeConfig}


# What sbatch and other launchers call our keys.
_ALSO_CALLED = {
    "ntasks": "slurm.tasks_per_node",
    "tasks": "slurm.tasks_per_node",
    "gpus": "slurm.gpus_per_node",
    "cpus": "slurm.cpus_per_task",
    "timeout": "slurm.time_min",
}


def keys_of(schema: type) -> list[str]:
    """Return the keys of a section, as users write them."""
    return [KEY_OF_FIELD.get(item.name, item.name) for item in dataclasses.fields(schema)]


def all_keys() -> list[str]:
    """Return every key, dotted; sections included."""
    keys: list[str] = []
    for item in dataclasses.fields(RunConfig):
        keys.append(item.name)
        if dataclasses.is_dataclass(item.type):
            keys += [f"{item.name}.{key}" for key in keys_of(cast(type, item.type))]
    return keys


def meant(given: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?" for the nearest known key: as it is spelled, or right but in another section."""
    if given in known:
        return f"; write it in its section, as `{given.replace('.', ': {', 1)}: …}}`"
    last = given.rpartition(".")[2]
    near = (
        [key for key in known if key == _ALSO_CALLED.get(last)]
        or [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(given, known, n=1, cutoff=0.6)
        or [key for key in known if key.rpartition(".")[2] in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1)]
    )
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(key for key in known if '.' not in key)}"
