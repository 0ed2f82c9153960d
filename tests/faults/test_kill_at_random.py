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
    promised, newest, save_s = [], 0, 0.0
    saves, interrupted, unacknowledged = 0, 0, 0
    for kill in range(KILLS):
        looper = server.start("looper", root=str(root), step=newest + 1)
        assert looper.hear() == {"ready": True}
        # So many saves and a part of one, in the time that they take here and now: on a loaded machine it is killed in them, too.
        count, part = chance.randrange(5), chance.uniform(0, 1.5)
        began = time.monotonic()
        said = [looper.hear()["acknowledged"] for _ in range(count)]
        save_s = (time.monotonic() - began) / count if count else save_s
        time.sleep(part * save_s)  # the instant is what is random here
        said += [message["acknowledged"] for message in looper.kill()]
        assert looper.exit_code == -9
        saves += len(said)
        promised += said
        writing = newest + len(said) + 1
        left = facts_of(RunLayout(root))
        whole = {*left.get("losses", ())}
        try:
            assert whole <= {*promised, writing}, left
            # The next attempt commits the end of the epoch, mostly another name than what was being written.
            _, newest = assert_sound(server, root, promised, in_flight=[writing])
        except AssertionError as error:
            error.add_note(f"it had said {said}, and {writing} may have come through; promised were {promised[-12:]}")
            error.add_note(f"kill {kill} of seed {SEED}, {part:.2f} of a save ({save_s * 1e3:.2f} ms) behind the first {count}")
            raise
        interrupted += bool(left["temporary"])
        unacknowledged += writing in whole
        # What is whole counts from then on, acknowledged or not: where it had its name when it was killed, but the pointer did not
        # name it yet, it is not gone on from, but the next commit may find it the best one.
        promised += [*whole, newest]
    figure(
        f"{KILLS} kills (seed {SEED}), {saves} saves; {interrupted} were killed within a save; "
        f"{unacknowledged} saves were whole when killed before they said so"
    )
    assert interrupted > KILLS / 4
