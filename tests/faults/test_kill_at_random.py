"""SIGKILL at random instants of a run that saves all the time, 500 times in one directory."""

import random
import time

import pytest

from support.fault_roles import facts_of
from support.faults import RunLayout, assert_sound, scaled

pytestmark = pytest.mark.timeout(900)
KILLS = scaled(40, 500)
SEED = 20240229


def test_a_run_that_is_killed_again_and_again_goes_on_from_what_was_acknowledged(server, run_dir, figure):
    chance, root = random.Random(SEED), run_dir / "run"
    acknowledged, newest, saves, unacknowledged = [], 0, 0, 0
    for kill in range(KILLS):
        looper = server.start("looper", root=str(root), step=newest + 1)
        assert looper.hear() == {"ready": True}
        delay_s = chance.uniform(0, 0.08)
        time.sleep(delay_s)  # the instant is what is random here
        said = [message["acknowledged"] for message in looper.kill()]
        assert looper.exit_code == -9
        acknowledged += said
        saves += len(said)
        if kill == 0 and not acknowledged:
            newest = facts_of(RunLayout(root))["newest"] or 0
            continue
        # The next attempt commits the end of the epoch: that is another name than what was being written.
        in_flight = range(newest, newest + len(said) + 2)
        try:
            found, newest = assert_sound(server, root, acknowledged, in_flight=in_flight)
        except AssertionError as error:
            error.add_note(f"it had said {said}; {in_flight} may have come through; acknowledged were {acknowledged[-12:]}")
            error.add_note(f"kill {kill} of seed {SEED}, {delay_s * 1e3:.2f} ms after the claim")
            raise
        unacknowledged += found not in acknowledged
        # What was once found is promised from then on, acknowledged or not.
        acknowledged += [step for step in (found, newest) if step is not None]
    figure(f"{KILLS} kills (seed {SEED}), {saves} saves; {unacknowledged} saves were durable when killed before they said so")
    assert saves > KILLS / 2
