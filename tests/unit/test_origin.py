"""What an attempt goes on from: which file, and what is read of the place in training."""

import pytest
import torch

from hpcckpt.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Origin, choose, place_in, read, weights_in
from hpcckpt.policy import Position, Retention
from hpcckpt.state.tracked import FORMAT_VERSION
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import write_json
from hpcckpt.store.ledger import Ledger


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path / "run")


@pytest.fixture
def store(layout):
    store = CheckpointStore(layout, Retention())
    store.claim("7")
    return store


def content(epoch=1, step=12, *, finished=False, **changes):
    data_state = {"epoch_finished": finished, "loaders": {"0": {"consumed": 4, "num_samples": 12}}, "last_loader": "0"}
    whole = {
        "format_version": FORMAT_VERSION,
        "epoch": epoch,
        "step": step,
        "metrics": {"loss": 0.5},
        "rng_state": [{}],
        "data_state": data_state,
        "model_state_dict": {"weight": torch.ones(2)},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def commit(store, **where):
    whole = content(**where)
    finished = whole["data_state"]["epoch_finished"]
    return store.commit(
        whole["epoch"], whole["step"], epoch_finished=finished, write=lambda file: torch.save(whole, file), manifest={"metrics": {}}
    )


def ask(layout, **request):
    write_json(layout.resume_request, {"state": "asked", "from": "latest", "epoch": None, "step": None, "weights_only": False, **request})


def test_a_run_without_checkpoints_begins_anew(layout, store):
    origin = choose(layout, store, Ledger(layout.events))
    assert origin == Origin()
    assert (origin.epoch, origin.step) == (0, 0)


@pytest.mark.parametrize(("finished", "epoch"), [(False, 1), (True, 2)])
def test_it_goes_on_behind_the_newest_one(layout, store, finished, epoch):
    commit(store, epoch=0, step=6, finished=True)
    path = commit(store, epoch=1, step=12, finished=finished)
    origin = choose(layout, store, Ledger(layout.events))
    assert (origin.path, origin.position) == (path, Position(1, 12, finished))
    assert (origin.epoch, origin.step) == (epoch, 12)


def test_the_end_of_an_epoch_counts_more_than_a_stop_at_its_last_step(layout, store):
    commit(store, epoch=1, step=12)
    path = commit(store, epoch=1, step=12, finished=True)
    assert choose(layout, store, Ledger(layout.events)).path == path


def test_a_damaged_one_is_told_and_the_one_before_it_is_taken(layout, store):
    before = commit(store, epoch=0, step=6, finished=True)
    path = commit(store)
    path.write_bytes(path.read_bytes()[:-1])
    ledger = Ledger(layout.events)
    assert choose(layout, store, ledger).path == before
    (event,) = ledger.events()
    assert event["event"] == "damaged"
    assert path.name in event["problem"]


def test_where_all_are_damaged_nothing_is_begun_anew(layout, store):
    commit(store).write_bytes(b"")
    with pytest.raises(CheckpointCorruptError):
        choose(layout, store, Ledger(layout.events))


def test_a_request_is_carried_out_once_and_then_the_newest_counts_again(layout, store):
    first = commit(store, epoch=0, step=6, finished=True)
    commit(store, epoch=1, step=12, finished=True)
    ask(layout, epoch=0)
    ledger = Ledger(layout.events)
    assert choose(layout, store, ledger).path == first
    later = commit(store, epoch=1, step=11)
    assert choose(layout, store, ledger).path == later


def test_a_request_for_the_beginning_forgets_all(layout, store):
    commit(store)
    ask(layout, **{"from": "none"})
    assert choose(layout, store, Ledger(layout.events)) == Origin()


def test_another_runs_file_is_where_a_run_without_checkpoints_goes_on(layout, store, tmp_path):
    theirs = tmp_path / "theirs.pt"
    torch.save(content(3, 40, finished=True), theirs)
    ask(layout, **{"from": str(theirs)})
    ledger = Ledger(layout.events)
    for _ in range(2):  # as long as it has none of its own
        origin = choose(layout, store, ledger)
        assert (origin.path, origin.epoch, origin.step) == (theirs, 4, 40)
    own = commit(store, epoch=4, step=41)
    assert choose(layout, store, ledger).path == own


@pytest.mark.parametrize("strict", [True, False])
def test_its_weights_alone_have_no_place(layout, store, tmp_path, strict):
    theirs = tmp_path / "theirs.pt"
    torch.save({"weight": torch.ones(2)}, theirs)
    ask(layout, **{"from": str(theirs)}, weights_only=True, strict=strict)
    origin = choose(layout, store, Ledger(layout.events))
    assert origin == Origin(theirs, weights_only=True, strict=strict)
    assert (origin.epoch, origin.step) == (0, 0)


def test_a_file_that_has_gone_is_named(layout, store, tmp_path):
    ask(layout, **{"from": str(tmp_path / "gone.pt")})
    with pytest.raises(CheckpointNotFoundError, match=r"gone\.pt"):
        choose(layout, store, Ledger(layout.events))


def test_the_place_is_read_with_all_that_belongs_to_it(tmp_path):
    sizes = {"0": {"asked": 2, "together": 4}}
    data_state = {"epoch_finished": False, "loaders": {}, "last_loader": None, "unplaced_steps": 3, "batch_sizes": sizes}
    place = place_in(content(data_state=data_state), tmp_path)
    assert place.position == Position(1, 12, epoch_finished=False)
    assert (place.metrics, place.loaders, place.last_loader) == ({"loss": 0.5}, {}, None)
    assert (place.unplaced_steps, place.batch_sizes) == (3, sizes)


def test_what_a_former_version_did_not_write_is_not_needed(tmp_path):
    place = place_in(content(), tmp_path)
    assert (place.unplaced_steps, place.batch_sizes) == (0, {})


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        pytest.param([1], r"is no checkpoint of hpcckpt \(it has no format_version\)", id="a list"),
        pytest.param({"weight": 1}, r"is no checkpoint of hpcckpt", id="a state_dict"),
        pytest.param(content(format_version="1"), r"is no checkpoint of hpcckpt", id="a version that is no number"),
        pytest.param(content(format_version=FORMAT_VERSION + 1), r"upgrade hpcckpt", id="a later version"),
        pytest.param(content(rng_state=None, epoch=None), r"is no place in training, it lacks epoch, rng_state", id="things are missing"),
        pytest.param(content(data_state={}), r"its place in training cannot be read \(KeyError", id="no place in it"),
        pytest.param(content(data_state=[]), r"its place in training cannot be read \(TypeError", id="another kind of thing"),
        pytest.param(content(epoch="one"), r"its place in training cannot be read \(ValueError", id="an epoch that is no number"),
        pytest.param(
            content(data_state={"epoch_finished": True, "loaders": {}, "last_loader": None, "batch_sizes": {"0": 1}}),
            r"its place in training cannot be read \(AttributeError",
            id="sizes that are none",
        ),
    ],
)
def test_what_is_no_place_is_refused_and_says_how_its_weights_can_be_had(tmp_path, whole, words):
    with pytest.raises(CheckpointMismatchError, match=words) as raised:
        place_in(whole, tmp_path / "file.pt")
    assert "file.pt" in str(raised.value)
    assert "upgrade" in words or "resume.weights_only=true" in str(raised.value)


def test_a_runs_file_is_marked_as_being_read_and_another_ones_is_not(layout, store, tmp_path):
    own, theirs = commit(store), tmp_path / "theirs.pt"
    torch.save({"format_version": 1}, theirs)
    assert read(own, layout, lambda whole: whole["step"]) == 12
    assert read(theirs, layout, lambda whole: whole["format_version"]) == 1


def test_weights_of_a_run_are_those_of_each_module_that_it_has(tmp_path):
    names = {"model": ["weight"], "critic": ["weight"]}
    found = weights_in(content(), tmp_path, names)
    assert list(found) == ["model"]
    assert torch.equal(found["model"]["weight"], torch.ones(2))


def test_weights_of_another_program_are_the_models(tmp_path):
    state = {"module.weight": torch.ones(2)}
    assert list(weights_in(state, tmp_path, {"model": ["weight"], "critic": ["weight"]})) == ["model"]
    found = weights_in({"state_dict": state}, tmp_path, {"net": ["weight"]})
    assert list(found) == ["net"]
    assert list(found["net"]) == ["weight"]


@pytest.mark.parametrize("names", [{}, {"actor": ["weight"], "critic": ["weight"]}], ids=["none is tracked", "which of two is not said"])
def test_weights_of_another_program_that_could_be_any_ones_are_refused(tmp_path, names):
    with pytest.raises(CheckpointMismatchError, match="track the one that it is for as `model`"):
        weights_in({"weight": torch.ones(2)}, tmp_path, names)


def test_weights_of_a_later_format_are_refused(tmp_path):
    with pytest.raises(CheckpointMismatchError, match="upgrade hpcckpt"):
        weights_in(content(format_version=FORMAT_VERSION + 1), tmp_path, {"model": ["weight"]})
