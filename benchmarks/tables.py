"""Figures as tables in Markdown."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.figures import Case, Section, spread

_GB = 1e9


def title(section: str, name: str, case: Case) -> str:
    """Return what a case is of."""
    size = case.facts.get("size_bytes")
    return f"{section}, {name}" + (f": {size / _GB:.3g} GB" if size else "")


def table(section: str, case: Case) -> str:
    """Return the table of one case."""
    return _TABLES[section](case)


def machine(facts: Mapping[str, object], sections: Mapping[str, Section]) -> str:
    """Return what the figures depend on, in a line."""
    cases = [case for section in sections.values() for case in section.values()]
    counts = [max(map(len, rounds.values())) for case in cases for rounds in case.contenders.values()]
    return ", ".join([*(f"{key} {value}" for key, value in facts.items()), f"rounds {min(counts)} to {max(counts)}"])


def document_tables(sections: Mapping[str, Section]) -> dict[str, str]:
    """Return all tables of a document by name: of each case, and of several of a section side by side."""
    found = {f"{section} {name}": table(section, case) for section, cases in sections.items() for name, case in cases.items()}
    if "saves" in sections:
        found["saves side by side"] = _side_by_side(sections["saves"])
    found |= {f"growth by {kind}": _side_by_side(cases) for kind, cases in growth_by_kind(sections.get("growth", {})).items()}
    if "restore" in sections:
        found |= {f"restore side by side {model}": text for model, text in _restores(sections["restore"]).items()}
    return found


def growth_by_kind(section: Section) -> dict[str, Section]:
    """Return what grows: bytes, tensors or ranks."""
    found: dict[str, Section] = {}
    for name, case in section.items():
        kind = "ranks" if "world" in case.facts else "tensors" if name.endswith(" x 1 KB") else "bytes"
        found.setdefault(kind, {})[name] = case
    return found


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _saves(case: Case) -> str:
    limit, size = next(iter(case.contenders)), case.facts["size_bytes"]
    return _rows(
        ["", "median s (least to greatest)", "times raw", "CPU s", "memory ÷ state", "finds damage"],
        (
            [
                name,
                spread(rounds["wall_s"]),
                f"{case.ratios(name, limit):.2f}",
                f"{statistics.median(rounds['cpu_s']):.2g}",
                f"{statistics.median(rounds['memory_bytes']) / size:.2f}",
                case.facts["finds"][name],
            ]
            for name, rounds in case.contenders.items()
        ),
    )


def _stall(case: Case) -> str:
    size = case.facts["size_bytes"]
    return _rows(
        ["", "the call, s", "the loop's extra time, s", "durable after, s", "memory ÷ state", "finds damage"],
        (
            [
                name,
                spread(rounds["call_s"]),
                spread(rounds["extra_s"]),
                spread(rounds["durable_s"]) if "durable_s" in rounds else "",
                f"{rounds['peak_bytes'][0] / size:.2f}",
                case.facts["finds"][name],
            ]
            for name, rounds in case.contenders.items()
        ),
    )


def _restore(case: Case) -> str:
    size = case.facts["size_bytes"]
    return _rows(
        ["", "median s (least to greatest)", "read from the disk ÷ state", "memory at most ÷ state", "memory kept ÷ state", "verified"],
        (
            [
                name,
                spread(rounds["wall_s"]),
                f"{statistics.median(rounds['read_bytes']) / size:.2f}",
                f"{rounds['peak_bytes'][0] / size:.2f}",
                f"{statistics.median(rounds['kept_bytes']) / size:.2f}",
                case.facts["finds"][name],
            ]
            for name, rounds in case.contenders.items()
        ),
    )


def _restores(section: Section) -> dict[str, str]:
    """Return for each model the seconds of all its cases."""
    found = {}
    for model in dict.fromkeys(case.facts["model"] for case in section.values()):
        cases = [case for case in section.values() if case.facts["model"] == model]
        header = ["", *(f"{case.facts['world']} process{'es' * (case.facts['world'] > 1)}, {case.facts['cache']}" for case in cases)]
        rows = [[name, *(spread(case.contenders[name]["wall_s"]) for case in cases)] for name in cases[0].contenders]
        found[model] = _rows(header, rows)
    return found


def _growth(case: Case) -> str:
    return _rows(
        ["", "median s (least to greatest)"],
        ([name, spread(rounds["wall_s"])] for name, rounds in case.contenders.items()),
    )


def _side_by_side(section: Section) -> str:
    """Return the seconds of all cases, a row for each."""
    names = list(next(iter(section.values())).contenders)
    rows = [[label, *(spread(case.contenders[name]["wall_s"]) for name in names)] for label, case in section.items()]
    return _rows(["", *names], rows)


def _start(case: Case) -> str:
    measures = list(dict.fromkeys(measure for rounds in case.contenders.values() for measure in rounds))
    labels = case.facts["labels"]
    return _rows(
        ["", *(labels[measure] for measure in measures)],
        (
            [name, *(spread(rounds[measure]) if measure in rounds else "" for measure in measures)]
            for name, rounds in case.contenders.items()
        ),
    )


_TABLES: dict[str, Callable[[Case], str]] = {
    "saves": _saves,
    "stall": _stall,
    "restore": _restore,
    "growth": _growth,
    "start and stop": _start,
}
