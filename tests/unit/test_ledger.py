"""The ledger: every event is one line, whoever writes, and it never stops a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.store.ledger import Ledger, append_lines, read_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_events_come_back_in_order_with_their_time(path):
    ledger = Ledger(path)
    assert ledger.events() == []
    ledger.append("attempt", generation=1, host="n1")
    ledger.append("saved", file="a.pt", notes=("x",))
    first, second = ledger.events()
    assert first | {"event": "attempt", "generation": 1, "host": "n1"} == first
    assert second | {"event": "saved", "file": "a.pt", "notes": ["x"]} == second
    assert first["time"] <= second["time"]
    assert ledger.events(skip=1) == [second]


def test_the_file_is_private(path):
    Ledger(path).append("attempt")
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_event_is_durable_when_append_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size) or fsync(descriptor))
    Ledger(path).append("attempt")
    assert synced == [path.stat().st_size]


@pytest.mark.parametrize("text", ["a\nb", "\r\n", "\u2028\x85", '"}\n{"event": "forged"}', "ü€"], ids=ascii)
def test_a_value_stays_within_its_line(path, text):
    ledger = Ledger(path)
    ledger.append("failed", error=text)
    ledger.append("left")
    assert [event["event"] for event in ledger.events()] == ["failed", "left"]
    assert ledger.events()[0]["error"] == text
    assert path.read_bytes().count(b"\n") == 2


def test_a_value_that_json_does_not_know_is_written_as_text(path):
    Ledger(path).append("failed", where=Path("/a"))
    assert Ledger(path).events()[-1]["where"] == "/a"


APPENDS = """
import sys, pathlib
from hpcckpt.store.ledger import Ledger
ledger = Ledger(pathlib.Path(sys.argv[1]))
for number in range(200):
    ledger.append("tick", writer=sys.argv[2], number=number, padding="x" * (number * 7 % 500))
"""


def test_several_processes_append_whole_lines_each_in_its_order(path):
    writers = [subprocess.Popen([sys.executable, "-c", APPENDS, path, str(writer)]) for writer in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = path.read_text().splitlines()
    events = [json.loads(line) for line in lines if line]
    assert len(events) == 800
    for writer in range(4):
        assert [event["number"] for event in events if event["writer"] == str(writer)] == list(range(200))


@pytest.mark.parametrize("torn", ['{"event": "sa', "{", '{"event": "saved"}', "\ufffd", "[1]\n", "\n\n"], ids=ascii)
def test_a_torn_line_takes_neither_the_line_before_nor_the_one_behind_with_it(path, torn):
    ledger = Ledger(path)
    ledger.append("before")
    with path.open("a") as file:
        file.write(torn)
    ledger.append("behind")
    kept = ["before", "saved", "behind"] if torn == '{"event": "saved"}' else ["before", "behind"]
    assert [event["event"] for event in ledger.events()] == kept


@settings(deadline=None)
@given(cut=st.integers(0, 200))
def test_a_crash_at_any_byte_costs_the_last_line_only(tmp_path_factory, cut):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    for number in range(3):
        append_lines(path, json.dumps({"number": number, "padding": "ü" * 9}) + "\n")
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n") + (data[cut : cut + 1] == b"\n")
    assert [line["number"] for line in read_lines(path)] == list(range(whole))
    append_lines(path, '{"number": 9}\n')
    assert [line["number"] for line in read_lines(path)] == [*range(whole), 9]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_the_line_and_does_not_raise():
    Ledger(Path("/dev/full")).append("attempt")


def test_a_directory_that_is_gone_costs_the_line_and_does_not_raise(tmp_path):
    Ledger(tmp_path / "gone" / "events.jsonl").append("attempt")
    assert Ledger(tmp_path / "gone" / "events.jsonl").events() == []


def test_a_symlink_is_not_followed(path, tmp_path):
    path.symlink_to(tmp_path / "victim")
    Ledger(path).append("attempt")
    assert not (tmp_path / "victim").exists()


def test_a_damaged_line_is_left_out(path):
    path.write_bytes(b'{"event": "a"}\n\xff\xfe\x00\n7\nnull\n' + b"[" * 100_000 + b'\n{"event": "b"}\n')
    assert [event["event"] for event in Ledger(path).events()] == ["a", "b"]
