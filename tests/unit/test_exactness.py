"""The report of a restart: a verdict that follows from what was found, in words and as plain values."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.exactness import Exactness, per_rank
from hpcckpt.state.text import ranges

TEXTS = st.lists(st.text(max_size=8), max_size=4)
REPORTS = st.builds(Exactness, *[TEXTS.map(tuple)] * 4)


def test_a_restart_without_differences_is_bit_exact_in_one_line():
    report = Exactness(restored=("model", "optimizer", "generators of 4 ranks"))
    assert report.is_exact
    assert report.lines() == ["bit-exact: restored model, optimizer, generators of 4 ranks"]


def test_differences_make_the_verdict():
    report = Exactness(("model", "optimizer"), ("threads of torch on the CPU 4 then, 8 now", "rank 3: no generators"))
    assert not report.is_exact
    assert report.lines() == [
        "NOT bit-exact from here on: threads of torch on the CPU 4 then, 8 now; rank 3: no generators",
        "restored model, optimizer",
    ]


def test_doubts_take_the_promise_back_but_not_the_verdict():
    report = Exactness(("model",), doubts=("cudnn chooses",))
    assert report.is_exact
    assert report.lines() == ["restored to the last bit: model", "may differ from run to run: cudnn chooses"]


def test_notes_leave_the_verdict_alone():
    report = Exactness(("model",), notes=("scaler has no state", "scheduler: T_max is 12"))
    assert report.is_exact
    assert report.lines() == ["bit-exact: restored model", "note: scaler has no state", "note: scheduler: T_max is 12"]


def test_a_beginning_says_so():
    assert Exactness().lines() == ["nothing restored: begins anew"]
    assert Exactness(differs=("weights only",)).lines() == ["NOT bit-exact from here on: weights only", "restored nothing"]


@given(REPORTS)
def test_every_report_is_short_lines_with_all_that_was_found(report):
    lines = report.lines()
    assert lines[0].startswith("NOT bit-exact") == bool(report.differs)
    assert all(line.splitlines() in ([line], []) for line in lines)
    everything = "\n".join(lines)
    for text in (*report.restored, *report.differs, *report.doubts, *report.notes):
        assert " ".join(text.split()) in everything


@given(REPORTS)
def test_the_fields_are_all_of_it_and_plain(report):
    fields = report.fields()
    assert json.loads(json.dumps(fields)) == fields
    again = Exactness(*(tuple(fields[name]) for name in ("restored", "differs", "doubts", "notes")))
    assert again == report
    assert fields["bit_exact"] is report.is_exact


def test_what_all_ranks_say_stands_alone_and_what_some_say_names_them():
    assert per_rank([["a", "b"], ["a"], ["a"], ["a", "c"], ["a"], ["a", "c"]]) == ("a", "rank 0: b", "ranks 3, 5: c")


def test_many_ranks_are_named_in_ranges():
    says = [*range(8), 12]
    assert per_rank([["x"] if rank in says else [] for rank in range(16)]) == ("ranks 0-7, 12: x",)


def test_one_rank_alone_is_not_named():
    assert per_rank([["a", "b", "a"]]) == ("a", "b")


def test_no_ranks_and_no_texts_are_nothing():
    assert per_rank([]) == per_rank([[], []]) == ()


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=5), max_size=9))
def test_every_text_is_there_once_with_exactly_the_ranks_that_said_it(texts):
    merged = per_rank(texts)
    assert len(merged) == len({text for found in texts for text in found})
    for line in merged:
        who, _, text = line.rpartition(": ")
        ranks = numbers_of(who.removeprefix("ranks ").removeprefix("rank ")) if who else set(range(len(texts)))
        assert ranks == {rank for rank, found in enumerate(texts) if text in found}


@given(st.lists(st.integers(0, 40)))
def test_ranges_hold_exactly_their_numbers_and_are_never_longer_than_a_list(numbers):
    text = ranges(numbers)
    assert numbers_of(text) == set(numbers)
    assert len(text) <= len(", ".join(map(str, sorted(set(numbers)))))


def numbers_of(text):
    """Return the numbers that `ranges` wrote."""
    numbers = set()
    for part in filter(None, text.split(", ")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
