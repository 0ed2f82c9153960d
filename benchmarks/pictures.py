"""Figures as pictures and as a document's tables: `python -m benchmarks.pictures bench.json docs/explanation [--document FILE]`.

Pictures are bars of medians with whiskers from the least to the greatest. The same figures give the same bytes.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks import tables
from benchmarks.figures import Case, Section, read

_MARKED = re.compile(r"(<!-- table: (?P<name>[^\n]*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_SHOWN = re.compile(r"\]\(([^)/]+\.svg)\)")
_LIMITS = ("raw ", "one copy", "no save")
_OURS, _PEER, _LIMIT = "#1f6feb", "#8c959f", "#d0d7de"
_WIDTH, _LEFT, _RIGHT, _BAR, _STEP, _TOP = 720, 250, 80, 14, 24, 44


@dataclass(frozen=True)
class Bar:
    """One bar: the rounds of a contender."""

    label: str
    values: Sequence[float]
    color: str


def picture(heading: str, bars: Sequence[Bar]) -> str:
    """Return an SVG of horizontal bars."""
    most = max(0.0, *(max(bar.values) for bar in bars)) or 1.0
    height = _TOP + _STEP * len(bars) + 12

    def x(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * max(value, 0.0) / most, 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="14" fill="#1f2328">{escape(heading)}</text>',
    ]
    for number, bar in enumerate(bars):
        top, middle = _TOP + _STEP * number, _TOP + _STEP * number + _BAR / 2
        median, least, greatest = statistics.median(bar.values), min(bar.values), max(bar.values)
        lines += [
            f'<text x="{_LEFT - 8}" y="{middle + 4:g}" text-anchor="end" fill="#1f2328">{escape(bar.label)}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{x(median) - _LEFT:.1f}" height="{_BAR}" fill="{bar.color}"/>',
            f'<path d="M{x(least)} {top + 3}v8m0 -4H{x(greatest)}m0 -4v8" stroke="#1f2328" fill="none"/>',
            f'<text x="{x(greatest) + 6:.1f}" y="{middle + 4:g}" fill="#1f2328">{median:.3g} s</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def pictures(sections: Mapping[str, Section]) -> Iterator[tuple[str, str]]:
    """Yield file names and pictures of what is there."""
    for name, case in sections.get("saves", {}).items():
        yield f"saves-{_slug(name)}.svg", picture(f"A durable save, {name}: seconds", _bars(case, "wall_s"))
    for name, case in sections.get("stall", {}).items():
        heading = f"What a save costs a training loop beside it, {name}: extra seconds of the loop"
        yield f"stall-{_slug(name)}.svg", picture(heading, _bars(case, "extra_s"))
    for name, case in sections.get("restore", {}).items():
        world, cache = case.facts["world"], case.facts["cache"]
        heading = f"From the file to a live model, {case.facts['model']}, {world} process{'es' * (world > 1)}, page cache {cache}: seconds"
        yield f"restore-{_slug(name)}.svg", picture(heading, _bars(case, "wall_s"))
    for kind, cases in tables.growth_by_kind(sections.get("growth", {})).items():
        bars = [Bar(f"{name}: {bar.label}", bar.values, bar.color) for name, case in cases.items() for bar in _bars(case, "wall_s")]
        yield f"growth-{kind}.svg", picture(f"Durable saves over {kind}: seconds", bars)


def filled(text: str, found: Mapping[str, str]) -> str:
    """Return a document with the tables that it has marks for.

    Raises:
        KeyError: there are no figures for one.
    """
    return _MARKED.sub(lambda match: f"{match[1]}{found[match['name']]}\n", text)


def _bars(case: Case, measure: str) -> list[Bar]:
    return [
        Bar(name, rounds[measure], _OURS if name.startswith("hpcckpt") else _LIMIT if name.startswith(_LIMITS) else _PEER)
        for name, rounds in case.contenders.items()
        if measure in rounds
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main() -> None:
    """Write pictures, and tables into a document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", type=Path, help="what --json of the programs has written")
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="where pictures go")
    parser.add_argument(
        "--document", type=Path, default=None, help="a document whose marked tables are replaced, and whose pictures are all that is drawn"
    )
    options = parser.parse_args()
    sections = read(options.figures)
    drawn = dict(pictures(sections))
    if options.document is not None:
        text = options.document.read_text()
        found = {
            **tables.document_tables(sections),
            "machine": tables.machine(json.loads(options.figures.read_text())["machine"], sections),
        }
        shown = _SHOWN.findall(text)
        missing = [name for name in (match["name"] for match in _MARKED.finditer(text)) if name not in found]
        if missing := missing + [name for name in shown if name not in drawn]:
            parser.error(f"{options.figures}: has no figures for {', '.join(missing)}; measure those, or take them out of the document")
        options.document.write_text(filled(text, found))
        drawn = {name: drawn[name] for name in shown}
        print(options.document)
    for name, text in drawn.items() if options.folder is not None else ():
        (options.folder / name).write_text(text)
        print(options.folder / name)


if __name__ == "__main__":
    main()
