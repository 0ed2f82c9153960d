"""What a submission asked to go on from is applied once, however often the job starts and is killed after that."""

import os
import shutil

import pytest

from hpcckpt.config import ResumeConfig
from hpcckpt.errors import CheckpointCorruptError, CheckpointNotFoundError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import read_json

RETENTION = Retention(keep_last=9, monitor="loss")
EPOCHS = [f"checkpoint_epoch{epoch:04d}.pt" for epoch in range(4)]
WITHIN = "checkpoint_epoch0001_step000000015.pt"
ALL = {*EPOCHS, WITHIN}
CALLS = ("open", "fsync", "rename", "unlink", "link", "mkdir")


def new_store(layout):
    """Return the store of a new attempt."""
    store = CheckpointStore(layout, RETENTION)
    store.claim(None)
    return store


def commit(store, epoch, loss, step=None):
    store.commit(
        epoch,
        (epoch + 1) * 10 if step is None else step,
        epoch_finished=step is None,
        write=lambda file: file.write(f"{epoch} {step} {loss}".encode()) and None,
        manifest={"metrics": {"loss": loss}},
    )


def make_run(root):
    layout = RunLayout(root)
    store = new_store(layout)
    commit(store, 0, 3.0)
    commit(store, 1, 1.5, step=15)
    commit(store, 1, 1.0)
    commit(store, 2, 2.0)
    commit(store, 3, 4.0)
    return layout


@pytest.fixture
def layout(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def elsewhere(tmp_path):
    path = tmp_path / "pretrained.pt"
    path.write_bytes(b"weights of another run")
    return path


def names(folder):
    return {path.name for path in folder.glob("checkpoint_*.pt*")}


def outcome(layout):
    """Return all that a later start depends on."""
    newest = CheckpointStore(layout, RETENTION).newest_good(pytest.fail)
    origin = (read_json(layout.resume_request) or {}).get("origin")
    return None if newest is None else newest.name, origin, names(layout.checkpoints), names(layout.superseded)


def in_superseded(name):
    return lambda layout: str(layout.superseded / name)


FIRST_TWO = {EPOCHS[0], WITHIN, EPOCHS[1]}
REQUESTS = {
    "epoch": (ResumeConfig(epoch=1), EPOCHS[1], None, FIRST_TWO),
    "first epoch": (ResumeConfig(epoch=0), EPOCHS[0], None, {EPOCHS[0]}),
    "newest epoch": (ResumeConfig(epoch=3), EPOCHS[3], None, ALL),
    "step": (ResumeConfig(step=15), WITHIN, None, {EPOCHS[0], WITHIN}),
    "step of an end": (ResumeConfig(step=20), EPOCHS[1], None, FIRST_TWO),
    "best": (ResumeConfig("best"), EPOCHS[1], None, FIRST_TWO),
    "none": (ResumeConfig("none"), None, None, set()),
    "path": (ResumeConfig("PATH"), None, lambda layout: str(layout.root.parent / "pretrained.pt"), set()),
    "weights of a path": (ResumeConfig("PATH", weights_only=True), None, lambda layout: str(layout.root.parent / "pretrained.pt"), set()),
    "weights of the newest": (ResumeConfig(weights_only=True), None, in_superseded(EPOCHS[3]), set()),
    "weights of an epoch": (ResumeConfig(epoch=1, weights_only=True), None, in_superseded(EPOCHS[1]), set()),
    "weights of a step": (ResumeConfig(step=15, weights_only=True), None, in_superseded(WITHIN), set()),
    "weights of the best": (ResumeConfig("best", weights_only=True), None, in_superseded(EPOCHS[1]), set()),
    "path of its own": (ResumeConfig("OWN/" + EPOCHS[2]), EPOCHS[2], None, ALL - {EPOCHS[3]}),
    "path of its own best": (ResumeConfig("OWN/best_model.pt"), EPOCHS[1], None, FIRST_TWO),
    "weights of its own path": (ResumeConfig("OWN/best_model.pt", weights_only=True), None, in_superseded(EPOCHS[1]), set()),
}


def meant(request_, layout):
    """Return the request with the place of its path filled in."""
    path = request_.from_.replace("PATH", str(layout.root.parent / "pretrained.pt")).replace("OWN", str(layout.checkpoints))
    return ResumeConfig(path, request_.epoch, request_.step, request_.weights_only)


def ask_and_apply(layout, request_):
    store = new_store(layout)
    resume.ask(layout, store, request_)
    return resume.apply(layout, store)


@pytest.mark.parametrize(("request_", "newest", "origin", "left"), REQUESTS.values(), ids=REQUESTS)
@pytest.mark.usefixtures("elsewhere")
def test_a_request_leads_to(layout, request_, newest, origin, left):
    applied = ask_and_apply(layout, meant(request_, layout))
    origin = None if origin is None else origin(layout)
    assert outcome(layout) == (newest, origin, left, ALL - left)
    assert (applied["state"], applied["origin"], applied["weights_only"]) == ("applied", origin, request_.weights_only)
    assert origin is None or os.path.isfile(origin)


@pytest.mark.parametrize("request_", [row[0] for row in REQUESTS.values()], ids=REQUESTS)
@pytest.mark.usefixtures("elsewhere")
def test_a_second_start_changes_nothing(layout, request_):
    first = ask_and_apply(layout, meant(request_, layout))
    before = outcome(layout)
    assert resume.apply(layout, new_store(layout)) == first
    assert outcome(layout) == before
    store = new_store(layout)
    commit(store, 9, 9.0)
    assert resume.apply(layout, store) == first
    assert outcome(layout)[0] == "checkpoint_epoch0009.pt"


def killed_at(number, act):
    """Run `act` in a process that is killed before its call `number` of CALLS; return whether it came to its end."""
    child = os.fork()
    if child != 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = [0]

    def patch(name):
        real = getattr(os, name)

        def counted(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                os._exit(9)
            return real(*arguments, **options)

        setattr(os, name, counted)

    for name in CALLS:
        patch(name)
    act()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["epoch", "none", "path", "weights of an epoch", "weights of its own path"])
@pytest.mark.usefixtures("elsewhere")
def test_a_kill_at_any_instant_ends_in_the_same_place(tmp_path, layout, name):
    request_, newest, origin, left = REQUESTS[name]
    for number in range(1, 200):
        copy = RunLayout(tmp_path / str(number) / "run")
        shutil.copytree(layout.root, copy.root, symlinks=True)
        shutil.copy(tmp_path / "pretrained.pt", copy.root.parent)
        resume.ask(copy, new_store(copy), meant(request_, copy))
        finished = killed_at(number, lambda copy=copy: resume.apply(copy, CheckpointStore(copy, RETENTION)))
        resume.apply(copy, new_store(copy))
        expected = (newest, None if origin is None else origin(copy), left, ALL - left)
        assert outcome(copy) == expected, f"killed before call {number}"
        assert names(copy.superseded) == {path.with_suffix(".pt").name for path in copy.superseded.glob("*.json")}
        if finished:
            break
    assert number > 15


def test_an_origin_whose_epoch_was_superseded_before_gets_the_name_it_is_moved_to(layout):
    ask_and_apply(layout, ResumeConfig(epoch=2))
    store = new_store(layout)
    commit(store, 3, 0.5)
    second = (layout.checkpoints / EPOCHS[3]).read_bytes()
    applied = ask_and_apply(layout, ResumeConfig(epoch=3, weights_only=True))
    assert applied["origin"] == str(layout.superseded / f"{EPOCHS[3]}.1")
    assert (layout.superseded / f"{EPOCHS[3]}.1").read_bytes() == second


def test_a_path_is_that_of_the_submissions_directory(layout, elsewhere, monkeypatch, tmp_path):
    store = new_store(layout)
    monkeypatch.chdir(elsewhere.parent)
    resume.ask(layout, store, ResumeConfig("pretrained.pt"))
    monkeypatch.chdir("/")
    assert resume.apply(layout, store)["origin"] == str(tmp_path / "pretrained.pt")


def test_without_a_request_there_is_nothing_to_apply(layout):
    before = outcome(layout)
    assert resume.apply(layout, new_store(layout)) is None
    resume.ask(layout, new_store(layout), ResumeConfig())
    assert not layout.resume_request.exists()
    assert outcome(layout) == before


def test_a_plain_submission_withdraws_a_request_that_no_job_has_taken_up(layout):
    before = outcome(layout)
    store = new_store(layout)
    resume.ask(layout, store, ResumeConfig("none"))
    resume.ask(layout, store, ResumeConfig())
    assert resume.apply(layout, store) is None
    assert outcome(layout) == before


def test_a_plain_submission_keeps_a_request_that_was_applied(layout, elsewhere):
    applied = ask_and_apply(layout, ResumeConfig(str(elsewhere)))
    resume.ask(layout, new_store(layout), ResumeConfig())
    assert resume.apply(layout, new_store(layout)) == applied


def test_a_later_request_takes_the_place_of_an_earlier_one(layout):
    ask_and_apply(layout, ResumeConfig(epoch=2))
    ask_and_apply(layout, ResumeConfig(epoch=0))
    assert outcome(layout) == (EPOCHS[0], None, {EPOCHS[0]}, ALL - {EPOCHS[0]})


REFUSED = {
    "epoch": (ResumeConfig(epoch=7), r"resume\.epoch=7: .* there are the epochs 0, 1, 2, 3"),
    "step": (ResumeConfig(step=16), r"resume\.step=16: .* there are the steps 10, 15, 20, 30, 40"),
    "path": (ResumeConfig("/nowhere/a.pt"), r"resume\.from=/nowhere/a\.pt: there is no such file"),
    "superseded name": (ResumeConfig("OWN/checkpoint_epoch0099.pt"), "there is no such file"),
}


@pytest.mark.parametrize(("request_", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_there_is_refused_at_submission_and_nothing_is_written(layout, request_, message):
    store = new_store(layout)
    for act in (lambda: resume.check(store, meant(request_, layout)), lambda: resume.ask(layout, store, meant(request_, layout))):
        with pytest.raises(CheckpointNotFoundError, match=message):
            act()
    assert not layout.resume_request.exists()


def test_weights_of_a_run_without_a_checkpoint_are_refused(tmp_path):
    layout = RunLayout(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"this run has no checkpoint yet; give resume\.from=PATH"):
        resume.ask(layout, new_store(layout), ResumeConfig(weights_only=True))


@pytest.mark.parametrize("name", [EPOCHS[1], "best_model.pt"])
def test_a_damaged_one_is_refused_at_submission(layout, name):
    (layout.checkpoints / EPOCHS[1]).write_bytes(b"damaged")  # and with it its second name
    request_ = ResumeConfig(epoch=1) if name in EPOCHS else ResumeConfig(str(layout.checkpoints / name))
    with pytest.raises(CheckpointCorruptError, match="choose another one"):
        resume.ask(layout, new_store(layout), request_)
    assert not layout.resume_request.exists()


def test_one_that_is_gone_when_the_job_starts_is_an_error_and_nothing_moves(layout):
    store = new_store(layout)
    resume.ask(layout, store, ResumeConfig(epoch=1))
    for name in (EPOCHS[1], manifest_name(EPOCHS[1])):
        (layout.checkpoints / name).unlink()
    before = names(layout.checkpoints)
    with pytest.raises(CheckpointNotFoundError, match=r"resume\.epoch=1"):
        resume.apply(layout, store)
    assert names(layout.checkpoints) == before


def test_a_check_writes_nothing(layout):
    store = new_store(layout)
    resume.check(store, ResumeConfig(epoch=1))
    resume.check(store, ResumeConfig())
    assert not layout.resume_request.exists()
