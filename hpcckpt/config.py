"""The configuration: a typed schema, one loader, and checks that answer a slip with the key that was meant.

defaults <- YAML file <- dotlist. `load` is the only function here that reads a file.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcckpt.errors import ConfigError

_ENTRYPOINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SBATCH_OPTION = re.compile(r"[a-z][a-z0-9_-]*")
# sbatch options that other keys own: a second value would be silently ignored or break the requeue.
_OWNED_OPTIONS = {
    "signal": "requeue.signal and requeue.lead_time_s",
    "requeue": "requeue.enabled",
    "no-requeue": "requeue.enabled",
    "open-mode": "nothing: logs always append, as a requeued job must",
    "output": "nothing: logs are in <run_dir>/logs",
    "error": "nothing: logs are in <run_dir>/logs",
    "array": "nothing: one run is one job",
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
# Whatever OmegaConf raises for a value that it cannot take.
_OMEGACONF_ERRORS = (OmegaConfBaseException, AssertionError, TypeError, ValueError, RecursionError)
# `from` cannot be an attribute in Python.
_KEY_OF_FIELD = {"from_": "from"}
_FIELD_OF_KEY = {key: name for name, key in _KEY_OF_FIELD.items()}


@dataclass
class SlurmConfig:
    """What is asked of Slurm; the local launcher uses tasks_per_node, gpus_per_node, cpus_per_task, time_min and setup."""

    nodes: int = 1
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


@dataclass
class RequeueConfig:
    """How a run goes on after a warning signal, and when it gives up."""

    enabled: bool = True
    signal: str = "USR1"
    lead_time_s: int = 120
    max_requeues: int = 100
    max_stalled: int = 3


@dataclass
class ResumeConfig:
    """Where a submission goes on from."""

    from_: str = "latest"
    epoch: int | None = None
    step: int | None = None
    weights_only: bool = False


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


_SECTIONS = {"slurm": SlurmConfig, "checkpoint": CheckpointConfig, "requeue": RequeueConfig, "resume": ResumeConfig}


def find_file(conf: str, folder: Path) -> Path:
    """Return the file that `conf=` means: a path, or a bare name in `folder`.

    Raises:
        ConfigError: there is no such file; the message lists what `folder` holds.
    """
    for candidate in (Path(conf), folder / conf, folder / f"{conf}.yaml"):
        if os.path.isfile(candidate):  # Path.is_file raises for a name that is too long
            return candidate
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "nothing"
    raise _refusal(f"conf={conf}", f"no such file, and {folder}/ holds {known}; give a path or one of those names")


def load(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the merged and checked configuration of a file, interpolations unresolved.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong type or makes no sense.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(str(path), f"cannot be read ({error}); give a readable YAML file") from None
    return parse(text, overrides, where=str(path), default_name=path.stem)


def parse(text: str, overrides: Sequence[str] = (), *, where: str = "configuration", default_name: str = "run") -> DictConfig:
    """Return the merged and checked configuration of a YAML text; `where` names it in messages.

    Raises:
        ConfigError: as `load`.
    """
    try:
        given = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise _refusal(f"{where}{line}", f"not valid YAML ({problem}); mend that line") from None
    except _OMEGACONF_ERRORS as error:
        raise _refusal(where, f"{_first_line(error) or 'a single value'}; write `key: value` lines") from None
    if not isinstance(given, DictConfig):
        raise _refusal(where, "a list at the top; write `key: value` lines")
    # A section whose lines are all commented out is null to YAML.
    filled = {key: value for key, value in _plain(given).items() if value is not None or key not in ("args", *_SECTIONS)}
    merged = _merge(_schema(default_name), _checked(filled, where))
    for override in overrides:
        merged = _merge(merged, _checked(_override(override), f"command line: {override}"))
    where = f"{where} and the command line" if overrides else where
    check(resolve(merged, where), where)
    return merged


def resolve(config: DictConfig, where: str = "configuration") -> RunConfig:
    """Return the configuration as plain typed objects, interpolations resolved.

    Raises:
        ConfigError: an interpolation leads nowhere, or a required key is missing.
    """
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        if "mandatory" in str(error).lower():
            key = _key(str(error.full_key))
            raise _refusal(where, f"{key} is missing; add `{key}: {'package.module:function' if key == 'entrypoint' else '…'}`") from None
        raise _wrong_value(where, error, "an interpolation") from None


def dump(config: DictConfig) -> str:
    """Return YAML that `parse` reads back; interpolations stay unresolved, so secrets from the environment stay out."""
    text: str = yaml.safe_dump(_renamed(_plain(config), _KEY_OF_FIELD), sort_keys=False, allow_unicode=True)
    return text


def check(config: RunConfig, where: str = "configuration") -> None:
    """Refuse values that cannot be meant.

    Raises:
        ConfigError: names the first such key, its value, and what to write.
    """
    for problem in _problems(config):
        raise _refusal(where, problem)


def _problems(config: RunConfig) -> Iterator[str]:
    slurm, checkpoint, requeue, resume = config.slurm, config.checkpoint, config.requeue, config.resume
    if config.name in ("", ".", "..") or "/" in config.name:
        yield f"name: {config.name!r} must be a word without a slash"
    if not _ENTRYPOINT.fullmatch(config.entrypoint):
        yield f"entrypoint: {config.entrypoint!r} is not of the form package.module:function"
    if not config.run_dir or "%" in config.run_dir:
        yield f"run_dir: {config.run_dir!r} must be a path without % (Slurm replaces % in the names of log files)"
    yield from _choice("cluster", config.cluster, ("auto", "slurm", "local"))
    yield from _choice("checkpoint.mode", checkpoint.mode, ("min", "max"))
    yield from _choice("requeue.signal", requeue.signal, ("USR1", "USR2"))
    # torch.manual_seed takes 64 bits; a negative seed would mean another generator state than it says.
    if not 0 <= config.seed < 2**64:
        yield f"seed: {config.seed} must be at least 0 and below 2**64"
    for key in ("nodes", "tasks_per_node", "cpus_per_task", "time_min"):
        yield from _at_least(f"slurm.{key}", getattr(slurm, key), 1)
    yield from _at_least("slurm.gpus_per_node", slurm.gpus_per_node, 0)
    yield from _at_least("checkpoint.keep_last", checkpoint.keep_last, 2)
    yield from _at_least("checkpoint.keep_best", checkpoint.keep_best, 0)
    for key in ("every_epochs", "every_steps", "keep_every_epochs"):
        yield from _at_least(f"checkpoint.{key}", getattr(checkpoint, key), 1)
    for key in ("lead_time_s", "max_stalled"):
        yield from _at_least(f"requeue.{key}", getattr(requeue, key), 1)
    yield from _at_least("requeue.max_requeues", requeue.max_requeues, 0)
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
        if _CONTROL.search(text):
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
        yield f"{key}: {value!r} is not one of {', '.join(allowed)}{_meant(value, allowed)}"


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


def _schema(default_name: str) -> DictConfig:
    schema = OmegaConf.structured(RunConfig)
    schema.name = default_name
    return cast(DictConfig, schema)


def _merge(under: DictConfig, over: DictConfig) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(under, over))


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _override(text: str) -> dict[str, Any]:
    key, separator, _ = text.partition("=")
    if not separator or not key.strip():
        raise _refusal("command line", f"{text!r} is not of the form key=value, as in args.lr=0.1")
    try:
        return _plain(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, *_OMEGACONF_ERRORS) as error:
        raise _refusal("command line", f"{text!r} cannot be read ({_first_line(error)}); quote the value") from None


def _checked(given: dict[str, Any], where: str) -> DictConfig:
    """Return `given` with field names for keys, after its keys and types were found to be good."""
    _check_keys(given, RunConfig, "", where)
    renamed = _renamed(given, _FIELD_OF_KEY)
    for key, value in renamed.items():
        try:
            _merge(_schema("run"), OmegaConf.create({key: value}))
        except _OMEGACONF_ERRORS as error:
            raise _wrong_value(where, error, key) from None
    return cast(DictConfig, OmegaConf.create(renamed))


def _check_keys(given: Any, schema: type, prefix: str, where: str) -> None:
    if not isinstance(given, Mapping):
        raise _refusal(where, f"{prefix.rstrip('.')}: holds {given!r}, but it has keys of its own: {', '.join(_keys(schema))}")
    for key, value in given.items():
        if key not in _keys(schema):
            raise _refusal(where, f"unknown key {prefix}{key}{_meant(f'{prefix}{key}', _all_keys())}")
        if not prefix and key in _SECTIONS and not (isinstance(value, str) and "${" in value):
            _check_keys(value, _SECTIONS[key], f"{key}.", where)


def _refusal(where: str, problem: str) -> ConfigError:
    """Return the error; on one line, whatever a key or a value holds."""
    return ConfigError(_CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), f"{where}: {problem}"))


def _wrong_value(where: str, error: BaseException, key: str = "") -> ConfigError:
    key = _key(getattr(error, "full_key", None) or key)
    return _refusal(where, f"{key}: {_first_line(error)}; mend that value")


def _keys(schema: type) -> list[str]:
    return [_KEY_OF_FIELD.get(item.name, item.name) for item in dataclasses.fields(schema)]


def _all_keys() -> list[str]:
    keys: list[str] = []
    for item in dataclasses.fields(RunConfig):
        keys.append(item.name)
        if dataclasses.is_dataclass(item.type):
            keys += [f"{item.name}.{key}" for key in _keys(cast(type, item.type))]
    return keys


def _meant(given: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?" for the nearest known key: as it is spelled, or right but in another section."""
    if given in known:
        return f"; write it in its section, as `{given.replace('.', ': {', 1)}: …}}`"
    last = given.rpartition(".")[2]
    near = (
        [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(given, known, n=1, cutoff=0.6)
        or [key for key in known if key.rpartition(".")[2] in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1)]
    )
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(key for key in known if '.' not in key)}"


def _renamed(plain: Any, names: Mapping[str, str]) -> Any:
    resume = plain.get("resume")
    if isinstance(resume, dict):
        plain = {**plain, "resume": {names.get(key, key): value for key, value in resume.items()}}
    return plain


def _key(full_key: str) -> str:
    return ".".join(_KEY_OF_FIELD.get(part, part) for part in full_key.split("."))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
