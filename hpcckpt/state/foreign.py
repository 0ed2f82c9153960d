"""Names in files of others, matched to the names a model has. Pure: mappings and strings, no files, no modules.

A wrapper has one child and nothing beside it, so where it stood, every key goes through its name; a submodule that its
author called `module` is told from it by what the model is called there. Where two readings fit equally well, nothing is
guessed: the keys stay unmatched, and loading says so.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.text import listed

# In which key of a file the model's state is looked for, in this order.
_MODEL_KEYS = ("model_state_dict", "state_dict", "model")
_EXTRA_STATE = "_extra_state"
# DataParallel and DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPER_PARTS: Final = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Deeper names are matched as they are spelled only; a file must not choose how deep we recurse.
_DEEPEST = 100
_SHOWN = 8

# A tree of names: a part with a dot -> what is below it; a last part -> the whole name.
_Tree = dict[str, Any]


class NotedTensors(dict[str, Any]):
    """The tensors of a file, and under which names there is another one's because the file's notes seem to say so."""

    def __init__(self, tensors: Mapping[str, Any], noted: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.noted = {name for name, kept in noted.items() if kept in tensors and name not in tensors}
        self.update({name: tensors[noted[name]] for name in self.noted})


def model_state_in(content: object) -> Mapping[str, Any]:
    """Return the model's state in the content of a file: of hpcckpt, Lightning, Hugging Face, or a script of one's own.

    It is under `model_state_dict`, `state_dict` or `model`, or is the whole content where that holds tensors and modules'
    extra state alone.

    Raises:
        CheckpointMismatchError: it is not there; lists the keys there are.
    """
    if not isinstance(content, Mapping):
        raise CheckpointMismatchError(
            f"it holds a {type(content).__name__}, not a model's state; save model.state_dict() with torch.save and load that"
        )
    for key in _MODEL_KEYS:
        state = content.get(key)
        # Under `model`, scripts keep a name or a configuration as well.
        if isinstance(state, Mapping) and (all(isinstance(name, str) for name in state) if key != "model" else _is_state(state)):
            return state
    if _is_state(content):
        return content
    raise CheckpointMismatchError(
        f"it has no model state under {', '.join(_MODEL_KEYS)}, and is none itself; its keys are {listed(list(content), _SHOWN)}: "
        "load it with torch.load(weights_only=True) and save the part that is the model's state"
    )


def _is_state(value: Mapping[Any, Any]) -> bool:
    return all(
        isinstance(key, str) and (isinstance(item, torch.Tensor) or key.rpartition(".")[2] == _EXTRA_STATE) for key, item in value.items()
    )


def fit_names(saved: Iterable[str], wanted: Collection[str], prefix: str | None = None) -> dict[str, str]:
    """Return, for each name of a model that a file has, the name it has in the file.

    1. The names as they are, with wrappers' parts dropped wherever that gives more names the model has: where all names
       of a (sub)module go through `module`, `_orig_mod` and their like. Names that are left over are tried one by one.
    2. A prefix, as Lightning (`model.`) and Hugging Face base models (`bert.`) have: `prefix`, or else the one under which
       most names are found, if it is more than without and no other one finds as many. It may be the file's names that
       have it, or the model's.

    No name of the file is used twice, and with a prefix none that is outside of it. A given `prefix` goes before the names
    as they are: who gives it knows the file.

    Args:
        saved: the names in the file.
        wanted: the names of the model, without wrappers' parts.
        prefix: what the names in the file have before the model's own (or the model's before the file's), `model.` say;
            "" for none at all.
    """
    saved = list(dict.fromkeys(saved))
    if prefix is not None:
        stripped, added = _readings(saved, wanted, _dotted(prefix))
        return max(stripped, added, key=len)
    plain = _matched({name: name for name in saved}, wanted)
    if len(plain) == len(wanted) or len(plain) == len(saved):
        return plain
    guess = _guessed(saved, wanted)
    return guess if len(guess) > len(plain) else plain


def fitted(state: Mapping[str, Any], wanted: Collection[str], prefix: str | None = None) -> dict[str, Any]:
    """Return the state of a file under the names of a model, matched as `fit_names` does.

    What matches none keeps a name of its own, which is none of the model's; with a given `prefix`, what is outside of it is
    left out.
    """
    there: Mapping[str, Any] = state
    if prefix:
        inside = _inside({name: name for name in state}, _dotted(prefix))
        there = {name: state[name] for name in inside.values()} or state
    result = renamed(there, fit_names(there, wanted, prefix), wanted)
    noted = state.noted if isinstance(state, NotedTensors) else frozenset()
    # A note that only looks like a name is nothing that the model lacks.
    return {name: value for name, value in result.items() if name in wanted or name not in noted}


def renamed(state: Mapping[str, Any], fitting: Mapping[str, str], wanted: Collection[str] = ()) -> dict[str, Any]:
    """Return the state of a file under the names that `fit_names` has matched; what matches none keeps its own name.

    Where that is one of `wanted`, or has been matched, it is told apart: it was not meant.
    """
    used = set(fitting.values())
    result = {name: state[saved] for name, saved in fitting.items()}
    for name, value in state.items():
        if name not in used:
            # A name that is left over must not take the place of the one that was matched.
            beside = f"{name} (beside {fitting[name]})" if name in fitting else f"{name} (of something else)"
            result[beside if name in fitting or name in wanted else name] = value
    return result


def common_prefixes(saved: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return the prefixes under which a file has most of a model's names, all that find equally many; to be named in an error."""
    counts = _counted(saved, wanted)
    highest = max(counts.values(), default=0)
    return sorted(prefix for prefix, count in counts.items() if count == highest)


def _readings(saved: Sequence[str], wanted: Collection[str], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is found if the file's names have the prefix, and if the model's have it."""
    below = {name.removeprefix(prefix): original for name, original in _inside({name: name for name in saved}, prefix).items()}
    inner = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix)}
    added = _matched({name: name for name in saved}, inner)
    return _matched(below, wanted), {inner[name]: original for name, original in added.items()}


def _dotted(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


def _inside(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return those of the names that have the prefix, behind wrappers around the whole: module.model.weight."""
    bare = dict(names)
    while bare and not any(name.startswith(prefix) for name in bare):
        tops = {name.partition(".")[0] for name in bare}
        if len(tops) != 1 or not tops <= WRAPPER_PARTS or not all("." in name for name in bare):
            break
        bare = {name.partition(".")[2]: original for name, original in bare.items()}
    return {name: original for name, original in bare.items() if name.startswith(prefix)}


def _guessed(saved: Sequence[str], wanted: Collection[str]) -> dict[str, str]:
    """Return what is found with the one prefix under which most names are; nothing where several find as many."""
    directions = (_counted(saved, wanted), _counted(wanted, saved))
    highest = max((count for counts in directions for count in counts.values()), default=0)
    best = [(index, prefix) for index, counts in enumerate(directions) for prefix, count in counts.items() if count == highest]
    if len(best) != 1:
        return {}
    index, prefix = best[0]
    return _readings(saved, wanted, prefix)[index]


def _counted(longer: Iterable[str], shorter: Iterable[str]) -> Counter[str]:
    """Return for each prefix how many names of `longer` are, behind it, one of `shorter`; wrappers' parts do not count."""
    known = {_canonical(name) for name in shorter}
    counts: Counter[str] = Counter()
    for name in {_canonical(name) for name in longer}:
        position = name.find(".") + 1
        for _ in range(_DEEPEST):
            if not position:
                break
            if name[position:] in known:
                counts[name[:position]] += 1
            position = name.find(".", position) + 1
    return counts


def _canonical(name: str) -> str:
    parts = name.split(".")
    if WRAPPER_PARTS.isdisjoint(parts):
        return name
    return ".".join([part for part in parts[:-1] if part not in WRAPPER_PARTS] + parts[-1:])


def _matched(saved: Mapping[str, str], wanted: Collection[str]) -> dict[str, str]:
    """Return wanted name -> value of `saved`, whose keys are names with wrappers' parts."""
    found = {name: saved[original] for name, original in _by_structure(saved, wanted).items()}
    used = set(found.values())
    rest = [name for name, original in saved.items() if original not in used]
    if rest and len(found) < len(wanted):
        found |= {name: saved[original] for name, original in _one_by_one(rest, wanted, found).items()}
    return found


def _by_structure(saved: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    return dict(_descend(_tree(saved), _tree(wanted), {}))


def _tree(names: Iterable[str]) -> _Tree:
    root: _Tree = {}
    for name in names:
        parts = name.split(".", _DEEPEST)
        node = root
        for part in parts[:-1]:
            node = node.setdefault(f"{part}.", {})
        node[parts[-1]] = name
    return root


def _descend(saved: _Tree, wanted: _Tree, known: dict[tuple[int, int], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return pairs (wanted, saved) of whole names: those below both, or behind a wrapper that `saved` is, whichever are more."""
    place = id(saved), id(wanted)
    if place not in known:
        found: list[tuple[str, str]] = []
        for part, below in saved.items():
            other = wanted.get(part)
            if isinstance(below, str) and isinstance(other, str):
                found.append((other, below))
            elif isinstance(below, dict) and isinstance(other, dict):
                found += _descend(below, other, known)
        (part, below), *more = saved.items() or (("", ""),)
        if not more and part.removesuffix(".") in WRAPPER_PARTS and isinstance(below, dict):
            behind = _descend(below, wanted, known)
            found = behind if len(behind) > len(found) else found
        known[place] = found
    return known[place]


def _one_by_one(rest: Iterable[str], wanted: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Return wanted name -> saved name for keys of a state dict that was put together by hand, wrapped in part."""
    candidates: dict[str, list[str]] = {}
    for name in wanted:
        candidates.setdefault(_canonical(name), []).append(name)
    claims: dict[str, list[str]] = {}
    for name in rest:
        fitting = [other for other in candidates.get(_canonical(name), ()) if _is_shortened(other.split("."), name.split("."))]
        fewest_drops = max((other.count(".") for other in fitting), default=0)
        nearest = [other for other in fitting if other.count(".") == fewest_drops]
        # One that is taken was meant all the same: the next best would be another tensor.
        if len(nearest) == 1 and nearest[0] not in taken:
            claims.setdefault(nearest[0], []).append(name)
    return {name: claimants[0] for name, claimants in claims.items() if len(claimants) == 1}


def _is_shortened(short: Sequence[str], long: Sequence[str]) -> bool:
    """Return whether `short` is `long` without some of the wrappers' parts."""
    remaining = iter(long)
    for part in short:
        for other in remaining:
            if other == part:
                break
            if other not in WRAPPER_PARTS:
                return False
        else:
            return False
    return not any(True for _ in remaining)
