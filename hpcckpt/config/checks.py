"""Values that have the right type and still cannot be meant."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hpcckpt.config.schema import ResumeConfig, RunConfig, SlurmConfig, meant
from hpcckpt.environment import node_range
from hpcckpt.errors import TaskEnvironmentError

_ENTRYPOINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SBATCH_OPTION = re.compile(r"[a-z][a-z0-9_-]*")
# sbatch options that other keys own: a second value would be silently ignored or break the requeue.
_OWNED_OPTIONS = {
    "signal": "requeue.signal and requeue.lead_time_s",
    "requeue": "requeue.enabled",
    "no-requeue": "requeue.enabled",
    "open-mode": "nothing: logs always append, as a requeued job must",
    "output": "nothing: logs are in <run_dir>/logs",
    "error": "nothing: logs are in <run_dir>/logs",
    "array": "--sweep; without it a run is one job",
    "job-name": "name",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.nodes and slurm.tasks_per_node",
    "ntasks-per-node": "slurm.tasks_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_task",
    "mem": "slurm.mem_gb",
    "time": "slurm.time_min",
    "parsable": "nothing: the job id is read from what sbatch says without it",
    "quiet": "nothing: the job id is read from what sbatch says without it",
}


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what cannot be meant: the key, its value, and what to write."""
    slurm, checkpoint, requeue, resume = config.slurm, config.checkpoint, config.requeue, config.resume
    if config.name in ("", ".", "..") or "/" in config.name:
        yield f"name: {config.name!r} must be a word without a slash"
    if not _ENTRYPOINT.fullmatch(config.entrypoint):
        yield f"entrypoint: {config.entrypoint!r} is not of the form package.module:function"
    if not config.run_dir or "%" in config.run_dir:
        yield f"run_dir: {config.run_dir!r} must be a path without % (Slurm replaces % in the names of log files)"
    yield from _choice("cluster", config.cluster, ("auto", "slurm", "local"))
    yield from _choice("checkpoint.mode", checkpoint.mode, ("min", "max"))
    yield from _choice("checkpoint.staging", checkpoint.staging, ("eager", "lazy"))
    yield from _choice("checkpoint.when_busy", checkpoint.when_busy, ("wait", "skip"))
    yield from _choice("checkpoint.writers", checkpoint.writers, ("rank0", "node_leaders", "all"))
    yield from _choice("checkpoint.locking", checkpoint.locking, ("flock", "off"))
    yield from _choice("requeue.signal", requeue.signal, ("USR1", "USR2"))
    # torch.manual_seed takes 64 bits; a negative seed would mean another generator state than it says.
    if not 0 <= config.seed < 2**64:
        yield f"seed: {config.seed} must be at least 0 and below 2**64"
    try:
        node_range(slurm.nodes)
    except TaskEnvironmentError as error:
        yield f"slurm.nodes: {error}"
    for key in ("tasks_per_node", "cpus_per_task", "time_min"):
        yield from _at_least(f"slurm.{key}", getattr(slurm, key), 1)
    yield from _at_least("slurm.gpus_per_node", slurm.gpus_per_node, 0)
    yield from _at_least("checkpoint.keep_last", checkpoint.keep_last, 2)
    yield from _at_least("checkpoint.keep_best", checkpoint.keep_best, 0)
    if checkpoint.monitor is not None and checkpoint.keep_best < 1:
        yield "checkpoint.keep_best: 0 would delete what checkpoint.monitor finds best; write 1, or remove checkpoint.monitor"
    for key in ("every_epochs", "every_steps", "keep_every_epochs"):
        yield from _at_least(f"checkpoint.{key}", getattr(checkpoint, key), 1)
    for key in ("lead_time_s", "max_stalled"):
        yield from _at_least(f"requeue.{key}", getattr(requeue, key), 1)
    for key in ("max_requeues", "on_failure"):
        yield from _at_least(f"requeue.{key}", getattr(requeue, key), 0)
    for key, number in (("slurm.mem_gb", slurm.mem_gb), ("checkpoint.every_minutes", checkpoint.every_minutes)):
        if number is not None and not 0 < number < math.inf:
            yield f"{key}: {number} must be above 0"
    if requeue.enabled and requeue.lead_time_s >= slurm.time_min * 60:
        yield (
            f"requeue.lead_time_s: {requeue.lead_time_s} s is not less than slurm.time_min ({slurm.time_min} min): the "
            "job would be stopped as it starts; ask for more time or a shorter lead"
        )
    yield from _resume_problems(resume)
    for key, text in (("name", config.name), ("run_dir", config.run_dir), *_strings("slurm", dataclasses.asdict(slurm))):
        if CONTROL.search(text):
            yield f"{key}: {text!r} contains a control character, which would become a line of the batch script; remove it"
    for option, value in slurm.extra.items():
        owner = _owner(option.replace("_", "-"))
        if not _SBATCH_OPTION.fullmatch(option):
            yield f"slurm.extra: {option!r} is no long option of sbatch; write it without the dashes, as in `switches: 1`"
        elif owner is not None:
            yield f"slurm.extra.{option}: is set by {owner}; remove it here"
        elif value is False or not isinstance(value, str | int | float):
            yield f"slurm.extra.{option}: {value!r} is no option's value; write text, a number, true for an option without one, or no line"


def _resume_problems(resume: ResumeConfig) -> Iterator[str]:
    yield from _at_least("resume.epoch", resume.epoch, 0)
    yield from _at_least("resume.step", resume.step, 0)
    if not resume.strict and not resume.weights_only:
        yield "resume.strict=false goes with resume.weights_only=true: a run that goes on needs all of its state"
    if not resume.from_:
        yield "resume.from: is empty; write latest, best, none or the path of a checkpoint"
    if resume.epoch is not None and resume.step is not None:
        yield "resume.epoch and resume.step are both set; give one"
    if resume.from_ != "latest" and (resume.epoch is not None or resume.step is not None):
        yield f"resume.from={resume.from_} contradicts resume.epoch and resume.step; give one"


def _owner(option: str) -> str | None:
    """Return what sets an option of sbatch already, which understands any beginning of its name."""
    texts = [item.name for item in dataclasses.fields(SlurmConfig) if item.type == str | None]
    owners = _OWNED_OPTIONS | {name.replace("_", "-"): f"slurm.{name}" for name in texts}
    if option == "gpus":  # whole, though another one begins with it
        return None
    return owners.get(option) or next((owner for name, owner in owners.items() if name.startswith(option)), None)


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{key}: {value!r} is not one of {', '.join(allowed)}{meant(value, allowed)}"


def _at_least(key: str, value: int | None, least: int) -> Iterator[str]:
    if value is not None and value < least:
        yield f"{key}: {value} must be at least {least}"


def _strings(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield every string in `value`, keys of mappings included, with its place."""
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{prefix}.{key}", str(key)
            yield from _strings(f"{prefix}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(f"{prefix}[{index}]", item)
