"""A pointer that is older than what the ledger knows of, as a network file system shows it for a while."""

import threading

import pytest

from hpcckpt.layout import RunLayout
from hpcckpt.store import view
from hpcckpt.store.durable import read_json, write_json
from hpcckpt.store.view import await_last_save, is_behind


def saved(generation, step):
    return {"event": "saved", "generation": generation, "step": step}


def pointer(generation, step):
    return {"file": "checkpoint_epoch0000.pt", "generation": generation, "step": step}


@pytest.mark.parametrize(
    ("shown", "events", "behind"),
    [
        pytest.param(None, [], False, id="a new run"),
        pytest.param(pointer(3, 40), [saved(2, 20), saved(3, 40)], False, id="all is there"),
        pytest.param(pointer(3, 30), [saved(3, 30), saved(3, 40)], True, id="the save before the last one"),
        pytest.param(pointer(2, 20), [saved(3, 40)], True, id="what an earlier attempt saved"),
        pytest.param(pointer(2, 60), [saved(3, 40)], True, id="even if that was further, before a rewind"),
        pytest.param(None, [saved(3, 40)], True, id="no pointer yet"),
        pytest.param(pointer(3, 50), [saved(3, 40)], False, id="a kill between the pointer and the ledger"),
        pytest.param(pointer(4, 10), [saved(3, 40)], False, id="a rewind, whose job was killed"),
        pytest.param(None, [saved(5, 40)], False, id="the folder was removed, and numbers begin anew"),
        pytest.param(None, [{"event": "saved", "step": 4}], False, id="a ledger from before generations were noted"),
        pytest.param(None, [{"event": "attempt", "generation": 3}], False, id="an attempt that saved nothing"),
    ],
)
def test_when_the_pointer_is_behind(shown, events, behind):
    assert is_behind(shown, events, generation=5) is behind


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "_POLL_S", 0.01)
    layout = RunLayout(tmp_path)
    layout.checkpoints.mkdir()
    write_json(layout.latest, pointer(1, 10))
    return layout


def test_what_can_be_seen_is_not_waited_for(layout):
    assert await_last_save(layout, [saved(1, 10)], 2) < 0.5


def test_it_waits_until_the_last_save_can_be_seen(layout):
    late = threading.Timer(0.3, lambda: write_json(layout.latest, pointer(1, 20)))
    late.start()
    assert await_last_save(layout, [saved(1, 20)], 2) >= 0.2
    assert read_json(layout.latest)["step"] == 20


def test_it_does_not_wait_for_ever(layout):
    assert await_last_save(layout, [saved(1, 20)], 2, patience_s=0.1) is None


def test_a_damaged_pointer_is_not_waited_for(layout):
    layout.latest.write_text("{")
    assert await_last_save(layout, [saved(1, 20)], 2) < 0.5
