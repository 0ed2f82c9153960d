"""What was measured: the figures of all rounds, as `bench.json` keeps them, and how a few of them are put into words."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """What was measured side by side: by contender and measure, a figure for each round."""

    facts: dict[str, Any] = field(default_factory=dict)
    contenders: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, contender: str, **measured: float) -> None:
        """Note a round of a contender."""
        for measure, value in measured.items():
            self.contenders.setdefault(contender, {}).setdefault(measure, []).append(value)

    def ratios(self, contender: str, other: str, measure: str = "wall_s") -> float:
        """Return the median of the ratios of rounds."""
        pairs = zip(self.contenders[contender][measure], self.contenders[other][measure], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


# By name of a state, a number of ranks, …
Section = dict[str, Case]


def read(path: Path) -> dict[str, Section]:
    """Return the sections of a file; none where there is no file."""
    if not path.exists():
        return {}
    sections = json.loads(path.read_text())["sections"]
    return {name: {case: Case(**value) for case, value in section.items()} for name, section in sections.items()}


def keep(path: Path | None, section: str, name: str, case: Case) -> None:
    """Put a case into a file, beside what is there of other programs; nothing happens without a path."""
    if path is None:
        return
    sections = read(path)
    sections.setdefault(section, {})[name] = case
    plain = {key: {name: asdict(case) for name, case in cases.items()} for key, cases in sections.items()}
    path.write_text(json.dumps({"machine": machine(), "sections": plain}, indent=1))


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("torch", "safetensors", "hpcckpt")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def spread(values: Sequence[float]) -> str:
    """Return median, least and greatest."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
