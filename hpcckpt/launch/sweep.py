"""A grid of configurations: one run each, and one array of Slurm for all of them."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from hpcckpt import config as configuration
from hpcckpt.config import RunConfig
from hpcckpt.errors import ConfigError, HpcckptError

_BRACKETS = {"[": "]", "{": "}", "(": ")"}
# Of a folder's name, in bytes; 255 is the limit of most file systems.
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Point:
    """One run of a submission, and the settings that no other one has; none for the only run."""

    merged: DictConfig
    own: tuple[str, ...] = ()


@contextmanager
def naming(own: Sequence[str]) -> Iterator[None]:
    """Within it, an error names the point that it is of, by its own settings."""
    try:
        yield
    except HpcckptError as error:
        if not own:
            raise
        raise type(error)(f"{' '.join(own)}: {error}") from None


def expand(load: Callable[[Sequence[str]], DictConfig], settings: Sequence[str], sweeps: Sequence[str]) -> list[Point]:
    """Return the points of a grid, the last key varying fastest, each with a run directory of its own.

    Args:
        load: returns the merged and checked configuration for a list of overrides.
        settings: overrides of all points.
        sweeps: `key=value,value,…`. One of a single value is a setting like any other.

    Raises:
        ConfigError: a sweep is not of that form, or a point's configuration is refused.
    """
    values = [_values(sweep) for sweep in sweeps]
    fixed = [*settings, *(of_key[0] for of_key in values if len(of_key) == 1)]
    swept = [of_key for of_key in values if len(of_key) > 1]
    keys = [text.partition("=")[0] for text in fixed] + [of_key[0].partition("=")[0] for of_key in swept]
    for of_key in swept:
        key = of_key[0].partition("=")[0]
        if keys.count(key) > 1:
            raise ConfigError(f"--sweep {key}: the key is given twice; give it once")
    points = []
    for chosen in itertools.product(*swept):
        with naming(chosen):
            points.append(Point(load([*fixed, *chosen]), chosen))
    _refuse_other_scripts(points)
    return _apart(points)


def _values(sweep: str) -> list[str]:
    """Return `key=a,b` as ["key=a", "key=b"]; commas within brackets and quotes do not count."""
    key, separator, text = sweep.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--sweep {sweep!r} is not of the form key=value,value as in args.lr=0.1,0.01")
    values = [value.strip() for value in _split(text)]
    if "" in values:
        raise ConfigError(f"--sweep {sweep!r}: a value is empty; give one between all commas, or null or '' in quotes")
    settings = [f"{key.strip()}={value}" for value in values]
    meanings = [_meaning(setting) for setting in settings]
    twice = next((setting for setting, meaning in zip(settings, meanings, strict=True) if meanings.count(meaning) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep {sweep!r}: the value {twice.partition('=')[2]} is there twice; give it once")
    return settings


def _meaning(setting: str) -> str:
    """Return how a setting is understood: 0.1 and 1e-1 are one value. What cannot be read is refused as the configuration is loaded."""
    try:
        return repr(OmegaConf.to_container(OmegaConf.from_dotlist([setting]), resolve=False))
    except Exception:  # noqa: BLE001 - any of YAML's and OmegaConf's
        return setting


def _split(text: str) -> list[str]:
    parts, closing, quote, begin = [], "", "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (closing or not text[begin:index].strip()):
            quote = character  # a quote within a word is a letter of it
        elif character in _BRACKETS:
            closing = _BRACKETS[character] + closing
        elif closing and character == closing[0]:
            closing = closing[1:]
        elif character == "," and not closing:
            parts.append(text[begin:index])
            begin = index + 1
    return [*parts, text[begin:]]


def _refuse_other_scripts(points: Sequence[Point]) -> None:
    """Refuse points whose batch scripts would differ: one array has one."""
    first: Mapping[str, Any] = {}
    for point in points:
        with naming(point.own):
            asked = _in_script(configuration.resolve(point.merged))
        first = first or asked
        for key, value in asked.items():
            if value != first[key]:
                raise ConfigError(
                    f"--sweep: {key} is {first[key]!r} in one point and {value!r} in another, but an array has one batch script for all; "
                    "submit once for each"
                )


def _in_script(config: RunConfig) -> dict[str, Any]:
    requeue = {f"requeue.{key}": getattr(config.requeue, key) for key in ("enabled", "signal", "lead_time_s")}
    return {
        "name": config.name,
        "cluster": config.cluster,
        **{f"slurm.{key}": value for key, value in vars(config.slurm).items()},
        **requeue,
    }


def _apart(points: Sequence[Point]) -> list[Point]:
    """Return the points with run directories that differ: where the configuration's do not, a folder in it for each."""
    folders = {os.path.realpath(os.path.expanduser(configuration.resolve(point.merged).run_dir)) for point in points}
    return list(points) if len(folders) == len(points) else [Point(_moved(point), point.own) for point in points]


def _moved(point: Point) -> DictConfig:
    unresolved = cast(dict[str, Any], OmegaConf.to_container(point.merged, resolve=False))["run_dir"]
    return cast(DictConfig, OmegaConf.merge(point.merged, {"run_dir": f"{unresolved}/{folder_name(point.own)}"}))


def folder_name(own: Sequence[str]) -> str:
    """Return a name for a folder, another one for other settings; without what a shell, OmegaConf or Slurm gives a meaning to."""
    plain = [re.sub(r"[^A-Za-z0-9._+=-]", "_", setting) for setting in own]
    name = ",".join(plain)
    if plain == list(own) and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(chr(0).join(own).encode()).hexdigest()[:8]}"
