"""Bytes that are not those that were committed: none is ever taken for a checkpoint."""

import json
import os
import random
import zipfile

import pytest

from hpcckpt.errors import HpcckptError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.store.checkpoints import CheckpointStore
from support.fault_roles import RETENTION, commit, wrong_with
from support.faults import scaled

pytestmark = pytest.mark.timeout(900)
FLIPS = scaled(200, 1200)
KIB = 120
SEED = 20
NEWEST, OLDER, OLDEST = "checkpoint_epoch0003.pt", "checkpoint_epoch0002.pt", "checkpoint_epoch0000.pt"


@pytest.fixture
def layout(tmp_path):
    """A directory with the checkpoints of steps 10 (the best), 30 and 40."""
    made = RunLayout(tmp_path)
    store = CheckpointStore(made, RETENTION)
    store.claim("7")
    for step, loss in ((10, 0.1), (20, 0.8), (30, 0.7), (40, 0.9)):
        commit(store, step, KIB, loss)
    assert sorted(path.name for path in made.checkpoints.glob("*.pt")) == ["best_model.pt", OLDEST, OLDER, NEWEST]
    return made


@pytest.fixture
def committed(layout):
    """The manifests as they were committed."""
    return {path.with_suffix(".pt").name: json.loads(path.read_text()) for path in layout.checkpoints.glob("checkpoint_*.json")}


def newest(layout):
    """Return the newest good checkpoint, as a process finds it that knows nothing else, and what was reported."""
    problems = []
    return CheckpointStore(layout, RETENTION).newest_good(problems.append), problems


def overwrite(path, data):
    """Put other bytes in a file's place: best_model.pt may be the same file."""
    path.unlink()
    path.write_bytes(data)


def assert_passed_over(layout, what):
    info, problems = newest(layout)
    assert info is not None, what
    assert info.name == OLDER, what
    assert len(problems) == 1, (what, problems)
    assert NEWEST in problems[0], (what, problems)


def test_every_flipped_bit_of_a_checkpoint_is_found(layout, committed, figure):
    chance, path = random.Random(SEED), layout.checkpoints / NEWEST
    data = path.read_bytes()
    for _ in range(FLIPS):
        offset, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        damaged = bytearray(data)
        damaged[offset] ^= bit
        overwrite(path, damaged)
        assert_passed_over(layout, f"bit {bit} of byte {offset}")
    overwrite(path, data)
    info, problems = newest(layout)
    assert (info.name, problems, wrong_with(path, committed[NEWEST])) == (NEWEST, [], None)
    figure(f"{FLIPS} flipped bits (seed {SEED}), all found")


def test_every_torn_checkpoint_is_found(layout, figure):
    path = layout.checkpoints / NEWEST
    data, older = path.read_bytes(), (layout.checkpoints / OLDER).read_bytes()
    size, page = len(data), 4096
    torn = {f"{length} bytes": data[:length] for length in (0, 1, 4, 30, 63, 64, page, size // 2, size - 22, size - 1)}
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        central = archive.start_dir
    for record in records:
        torn[f"within the header of {record.filename}"] = data[: record.header_offset + 15]
        torn[f"in the middle of {record.filename}"] = data[: record.header_offset + 30 + record.file_size // 2]
    torn["without the central directory"] = data[:central]
    torn["with half of the central directory"] = data[: (central + size) // 2]
    torn |= {f"{count} bytes more": data + bytes(count) for count in (1, page)}
    torn["twice"] = data + data
    torn["an older one's bytes"] = older
    torn["an older one's first half"] = older[: size // 2] + data[size // 2 :]
    torn["an older one's second half"] = data[: size // 2] + older[size // 2 :]
    for at in {page * (number * (size // page) // 8) for number in range(8)}:
        torn[f"a hole at {at}"] = data[:at] + bytes(page) + data[at + page :]
    swapped = data[:page] + data[2 * page : 3 * page] + data[page : 2 * page] + data[3 * page :]
    torn["swapped blocks"] = swapped
    torn["all zero"] = bytes(size)
    for what, damaged in torn.items():
        if damaged == data:
            continue  # there were nothing but zeros
        overwrite(path, damaged)
        assert_passed_over(layout, what)
    figure(f"{len(torn)} kinds of torn files, all found")


def test_a_real_hole_is_found(layout):
    path = layout.checkpoints / NEWEST
    data = path.read_bytes()
    half = len(data) // 2
    overwrite(path, data[:half])
    os.truncate(path, len(data))
    assert_passed_over(layout, "a hole")


BITS = [1 << bit for bit in range(8)]


def flips_of(data, changes=None):
    """Return every byte of a small file with each of its bits flipped; all other values too, in `make chaos`."""
    changes = changes or scaled(BITS, range(1, 256))
    for offset in range(len(data)):
        for change in changes:
            damaged = bytearray(data)
            damaged[offset] ^= change
            yield f"byte {offset} ({chr(data[offset])!r}) ^ {change}", bytes(damaged)


def assert_right(layout, committed, what):
    """Assert that what is found, if anything, is one of the checkpoints that were committed, and is called by its right name."""
    try:
        info, problems = newest(layout)
    except HpcckptError:
        return None, []
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert info is not None, f"{what}: as if there had never been a checkpoint"
    manifest = committed[info.name]
    assert (info.epoch, info.step, info.epoch_finished) == (manifest["epoch"], manifest["step"], manifest["epoch_finished"]), what
    return info.name, problems


def trials(layout, committed, path):
    """Damage a small file in every way, and yield what was found each time; tells every wrong answer at the end."""
    data, wrong = path.read_bytes(), []
    for what, damaged in flips_of(data):
        overwrite(path, damaged)
        try:
            yield what, *assert_right(layout, committed, what)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    overwrite(path, data)
    assert not wrong, f"{len(wrong)} wrong answers:\n" + "\n".join(wrong[:20])


def test_no_damage_of_the_pointer_leads_to_an_older_checkpoint_unnoticed(layout, committed, figure):
    # Small, so that all of them are looked at.
    count, silent, found = 0, [], {}
    for what, name, problems in trials(layout, committed, layout.latest):
        count += 1
        found[name] = found.get(name, 0) + 1
        if name != NEWEST and not problems:
            silent.append(f"{what}: {name}")
    figure(f"{count} damaged pointers: {found}")
    assert not silent, f"{len(silent)} times an older one was taken without a word: {silent[:10]}"
    assert set(found) == {NEWEST}


@pytest.mark.parametrize("name", [NEWEST, OLDER])
def test_no_damage_of_a_manifest_leads_to_a_wrong_checkpoint(layout, committed, name, figure):
    count, found = 0, {}
    for what, seen, problems in trials(layout, committed, layout.checkpoints / manifest_name(name)):
        count += 1
        found[seen] = found.get(seen, 0) + 1
        assert seen == NEWEST or (name == NEWEST and problems), what
    figure(f"{count} damaged manifests of {name}: {found}")
    assert set(found) <= {NEWEST, OLDER}


def test_no_damage_of_a_manifest_leads_to_a_wrong_checkpoint_when_the_newest_is_damaged_too(layout, committed, figure):
    os.truncate(layout.checkpoints / NEWEST, 5)
    count, found = 0, {}
    for what, seen, problems in trials(layout, committed, layout.checkpoints / manifest_name(OLDEST)):
        count += 1
        found[seen] = found.get(seen, 0) + 1
        assert seen == OLDER, what
        assert problems
    figure(f"{count} damaged manifests of the oldest one: {found}")


def test_no_damage_of_the_generation_crashes_a_claim(layout, figure):
    data, crashes, refused, count = layout.generation.read_bytes(), [], 0, 0
    number, rest = data[: data.index(b"job_id")], data[data.index(b"job_id") :]
    for what, damaged in flips_of(number, BITS):  # each is a claim, with its fsyncs
        count += 1
        overwrite(layout.generation, damaged + rest)
        try:
            CheckpointStore(layout, RETENTION).claim("7")
        except HpcckptError:
            refused += 1
        except Exception as error:
            crashes.append(f"{what}: {type(error).__name__}: {error}")
        overwrite(layout.generation, data)
    figure(f"{count} damaged generations: {refused} claims refused")
    assert not crashes, f"{len(crashes)} crashes:\n" + "\n".join(crashes[:20])
