"""defaults <- YAML file <- dotlist, merged and checked. `load` is the only function of the package that reads a file."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcckpt.config.checks import CONTROL, problems
from hpcckpt.config.schema import FIELD_OF_KEY, KEY_OF_FIELD, SECTIONS, ResumeConfig, RunConfig, all_keys, keys_of, meant
from hpcckpt.errors import ConfigError

# Whatever OmegaConf raises for a value that it cannot take.
_OMEGACONF_ERRORS = (OmegaConfBaseException, AssertionError, TypeError, ValueError, RecursionError)


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


def load(path: Path, overrides: Sequence[str] = (), defaults: Mapping[str, str] | None = None) -> DictConfig:
    """Return the merged and checked configuration of a file, interpolations unresolved.

    Args:
        path: its file.
        overrides: a dotlist over it.
        defaults: of keys at the top, for where the file has none; name: the file's.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong type or makes no sense.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(str(path), f"cannot be read ({error}); give a readable YAML file") from None
    return parse(text, overrides, where=str(path), defaults=defaults or {"name": path.stem})


def of_script(path: Path, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a script that was started without a submission: of a file, where there is one, and `overrides`.

    Raises:
        ConfigError: as `load`; or it says where to go on from.
    """
    defaults = {"name": name, "entrypoint": "__main__:main"}  # the script itself
    there = load(path, overrides, defaults) if path.is_file() else parse("{}", overrides, where=str(path), defaults=defaults)
    config = resolve(there, str(path))
    if config.resume != ResumeConfig():
        # Read again at each start, it would be obeyed again at each.
        raise ConfigError(
            f"{path}: resume.* is carried out once, by `python -m hpcckpt.submit`; a script of one's own goes on from the newest checkpoint"
        )
    return config


def parse(
    text: str,
    overrides: Sequence[str] = (),
    *,
    where: str = "configuration",
    defaults: Mapping[str, str] = MappingProxyType({"name": "run"}),
) -> DictConfig:
    """Return the merged and checked configuration of a YAML text; `where` names it in messages, `defaults` as `load` takes them.

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
    filled = {key: value for key, value in _plain(given).items() if value is not None or key not in ("args", *SECTIONS)}
    merged = _merge(_schema(tuple(defaults.items())), _checked(filled, where))
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
    text: str = yaml.safe_dump(_renamed(_plain(config), KEY_OF_FIELD), sort_keys=False, allow_unicode=True)
    return text


def check(config: RunConfig, where: str = "configuration") -> None:
    """Refuse values that cannot be meant.

    Raises:
        ConfigError: names the first such key, its value, and what to write.
    """
    for problem in problems(config):
        raise _refusal(where, problem)


@functools.cache
def _schema(defaults: tuple[tuple[str, str], ...] = ()) -> DictConfig:
    """Return the schema, which nobody writes to: `_merge` copies it. To build it takes milliseconds, and a sweep has many points."""
    schema = OmegaConf.structured(RunConfig)
    for key, value in defaults:
        schema[key] = value
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
    renamed = _renamed(given, FIELD_OF_KEY)
    for key, value in renamed.items():
        try:
            _merge(_schema(), OmegaConf.create({key: value}))
        except _OMEGACONF_ERRORS as error:
            raise _wrong_value(where, error, key) from None
    return cast(DictConfig, OmegaConf.create(renamed))


def _check_keys(given: Any, schema: type, prefix: str, where: str) -> None:
    if not isinstance(given, Mapping):
        raise _refusal(where, f"{prefix.rstrip('.')}: holds {given!r}, but it has keys of its own: {', '.join(keys_of(schema))}")
    for key, value in given.items():
        if key not in keys_of(schema):
            raise _refusal(where, f"unknown key {prefix}{key}{meant(f'{prefix}{key}', all_keys())}")
        if not prefix and key in SECTIONS and not (isinstance(value, str) and "${" in value):
            _check_keys(value, SECTIONS[key], f"{key}.", where)


def _refusal(where: str, problem: str) -> ConfigError:
    """Return the error; on one line, whatever a key or a value holds."""
    return ConfigError(CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), f"{where}: {problem}"))


def _wrong_value(where: str, error: BaseException, key: str = "") -> ConfigError:
    key = _key(getattr(error, "full_key", None) or key)
    return _refusal(where, f"{key}: {_first_line(error)}; mend that value")


def _renamed(plain: Any, names: Mapping[str, str]) -> Any:
    resume = plain.get("resume")
    if isinstance(resume, dict):
        plain = {**plain, "resume": {names.get(key, key): value for key, value in resume.items()}}
    return plain


def _key(full_key: str) -> str:
    return ".".join(KEY_OF_FIELD.get(part, part) for part in full_key.split("."))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
