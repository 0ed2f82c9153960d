"""What a start goes on from: a run's own checkpoints, weights of any origin, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from hpcckpt import save_dataparallel_checkpoint
from hpcckpt.background import Files
from hpcckpt.checkpoint import Checkpointer
from hpcckpt.config import ResumeConfig
from hpcckpt.data import Loops, Share, make_loader
from hpcckpt.distributed import Collectives
from hpcckpt.errors import CheckpointCorruptError, CheckpointMismatchError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Position, Retention
from hpcckpt.state.portable import plain_tensors
from hpcckpt.state.tracked import Tracked
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger
from hpcckpt.store.shelf import Shelf


class Attempt:
    """One start of a run in one process, as Run makes it."""

    def __init__(self, layout, seed=0, **objects):
        torch.manual_seed(seed)
        self.layout = layout
        self.objects = objects or {"model": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))}
        tracked = Tracked()
        for name, value in self.objects.items():
            tracked.add(name, value)
        self.store = CheckpointStore(layout, Retention())
        self.store.claim(None)
        self.ledger = Ledger(layout.events)
        self.checkpointer = Checkpointer(Collectives(0, 1, None), layout, tracked, 0, dict, Files(self.store, self.ledger))

    @property
    def model(self):
        return self.objects["model"]

    def save(self, epoch):
        self.checkpointer.save(Position(epoch, epoch + 1, epoch_finished=True), {}, Loops(), "test")

    def start_from(self, path, **options):
        resume.ask(self.layout, self.store, ResumeConfig(from_=str(path), **options))
        return self.checkpointer.restore(Loops())


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path / "run")


def weights(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_was_saved_is_restored(layout):
    first = Attempt(layout)
    first.save(0)
    second = Attempt(layout, seed=5)
    restored = second.checkpointer.restore(Loops())
    assert restored.place.position == Position(0, 1, epoch_finished=True)
    assert same(second.model, first.model.state_dict())


def looped(steps, *, is_over=False):
    """Return the loops of an epoch of four batches, behind some steps; a batch size as NumPy has it."""
    loops = Loops()
    loops.add(*make_loader(TensorDataset(torch.arange(8.0)), Share(0, 1, 0, 0), batch_size=np.int64(2)))
    place, loop = loops.create(loops._loaders[0][0], 0)
    loops.begin(place, loop, 0)
    for _ in range(steps):
        place.advance()
        loops.step()
    if is_over:
        loops.end(place, is_exhausted=True)
    return loops


# What is known behind step 4, and what more of it later: nothing else differs.
AT_FIRST = {"metrics": {"loss": 1.0}, "is_over": False, "lines": 0, "reasons": []}
LATER = {
    "a line of metrics": {"lines": 1},
    "gradients that were left over": {"reasons": ["left over"]},
    "a metric": {"metrics": {"loss": 1.0, "val": 0.5}},
    "the end of the loop": {"is_over": True},
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
@pytest.mark.parametrize("restarted", [False, True], ids=["in one attempt", "behind a restart"])
def test_what_is_known_of_a_step_only_later_takes_the_place_of_its_first_checkpoint(layout, restarted, later):
    attempt = Attempt(layout)

    def save(known):
        loops, facts = looped(4, is_over=known["is_over"]), {name: known[name] for name in ("lines", "reasons")}
        attempt.checkpointer.save(Position(0, 4, epoch_finished=False), known["metrics"], loops, "test", facts=facts)
        (path,) = layout.checkpoints.glob("*.pt")
        content = torch.load(path, weights_only=True)
        state = content["data_state"]
        place = state["loaders"]["0"]
        assert {"metrics": content["metrics"], "is_over": place["is_over"], "lines": state["lines"], "reasons": state["reasons"]} == known
        return path.stat().st_ino

    first = save(AT_FIRST)
    if restarted:
        attempt = Attempt(layout)
        attempt.checkpointer.restore(Loops())
    assert save(AT_FIRST) == first, "the very same was written twice"
    second = save(AT_FIRST | later)
    assert second != first
    assert save(AT_FIRST | later) == second, "the very same was written twice"
    assert [event["event"] for event in attempt.ledger.events()] == ["saved"] * 2


WRITERS = {
    "bare state dict": torch.save,
    "of a wrapped model": lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path),
    "Lightning": lambda state, path: torch.save(
        {"epoch": 3, "state_dict": {f"net.{key}": value for key, value in state.items()}, "hyper_parameters": {"lr": 0.1}}, path
    ),
    "safetensors": lambda state, path: save_file(dict(state), path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_weights_of_any_origin_begin_a_new_run(layout, tmp_path, write):
    state = weights()
    write(state, tmp_path / "weights")
    attempt = Attempt(layout)
    restored = attempt.start_from(tmp_path / "weights", weights_only=True)
    assert restored.place is None
    assert restored.exactness.differs == ("its weights alone were asked for: a new run begins from them",)
    assert same(attempt.model, state)


def test_weights_that_do_not_fit_in_full_are_refused_and_nothing_is_loaded(layout, tmp_path):
    state = {**weights(), "1.weight": torch.zeros(5, 4), "extra": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pt")
    attempt = Attempt(layout)
    before = {key: value.clone() for key, value in attempt.model.state_dict().items()}
    message = r"model: the checkpoint does not fit the model: the model has no extra; shapes differ: 1\.weight \(5, 4\) for \(2, 4\)"
    with pytest.raises(CheckpointMismatchError, match=message):
        attempt.start_from(tmp_path / "weights.pt", weights_only=True)
    assert same(attempt.model, before)


def test_without_strict_what_fits_is_loaded_and_the_rest_is_reported(layout, tmp_path):
    state = {**weights(), "1.weight": torch.zeros(5, 4)}
    torch.save(state, tmp_path / "weights.pt")
    attempt = Attempt(layout)
    own_head = attempt.model[1].weight.detach().clone()
    restored = attempt.start_from(tmp_path / "weights.pt", weights_only=True, strict=False)
    assert torch.equal(attempt.model[0].weight, state["0.weight"])
    assert torch.equal(attempt.model[1].weight, own_head)
    assert restored.exactness.notes == ("model: 3 loaded; 1 of another shape: 1.weight (5, 4) for (2, 4)",)


def test_the_weights_of_another_run_go_to_the_objects_they_were_saved_from(layout, tmp_path):
    other = Attempt(RunLayout(tmp_path / "other"), model=nn.Linear(2, 2), critic=nn.Linear(3, 1))
    other.save(0)
    attempt = Attempt(layout, seed=9, model=nn.Linear(2, 2), critic=nn.Linear(3, 1))
    attempt.start_from(other.layout.checkpoints / "checkpoint_epoch0000.pt", weights_only=True)
    for name in ("model", "critic"):
        assert same(attempt.objects[name], other.objects[name].state_dict())


def test_weights_that_were_saved_with_a_wrappers_names_begin_a_run_too(layout, tmp_path):
    other = nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    save_dataparallel_checkpoint(other, None, 3, tmp_path / "wrapped.pt", save_portable=False)
    attempt = Attempt(layout, seed=9)
    attempt.start_from(tmp_path / "wrapped.pt", weights_only=True)
    assert same(attempt.model, other.module.state_dict())


def test_weights_in_a_format_of_the_future_are_refused(layout, tmp_path):
    torch.save({"format_version": 99, "model_state_dict": weights()}, tmp_path / "future.pt")
    with pytest.raises(CheckpointMismatchError, match="written in format 99, this version reads up to 1"):
        Attempt(layout).start_from(tmp_path / "future.pt", weights_only=True)


def test_one_models_weights_for_several_are_refused(layout, tmp_path):
    torch.save(weights(), tmp_path / "weights.pt")
    attempt = Attempt(layout, generator=nn.Linear(2, 2), critic=nn.Linear(3, 1))
    with pytest.raises(CheckpointMismatchError, match=r"tracks generator, critic: track the one that it is for as `model`"):
        attempt.start_from(tmp_path / "weights.pt", weights_only=True)


def test_a_file_of_another_program_is_no_place_in_training(layout, tmp_path):
    torch.save(weights(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointMismatchError, match=r"no format_version.*resume\.weights_only=true"):
        Attempt(layout).start_from(tmp_path / "weights.pt")


def test_a_format_of_the_future_is_refused(layout, tmp_path):
    torch.save({"format_version": 99}, tmp_path / "future.pt")
    with pytest.raises(CheckpointMismatchError, match="written in format 99, this version reads up to 1; upgrade hpcckpt"):
        Attempt(layout).start_from(tmp_path / "future.pt")


@pytest.mark.parametrize("lacking", ["epoch", "data_state", "rng_state", "metrics", "model_state_dict"])
def test_a_file_that_lacks_a_part_is_refused_by_the_name_of_the_part(layout, tmp_path, lacking):
    first = Attempt(RunLayout(tmp_path / "other"))
    first.save(0)
    path = first.layout.checkpoints / "checkpoint_epoch0000.pt"
    content = torch.load(path, weights_only=True)
    del content[lacking]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(CheckpointMismatchError, match=lacking.removesuffix("_state_dict")):
        Attempt(layout).start_from(tmp_path / "part.pt")


def test_a_checkpoint_that_was_replaced_by_a_symlink_is_not_followed(layout, tmp_path):
    first = Attempt(layout)
    first.save(0)
    path = layout.checkpoints / "checkpoint_epoch0000.pt"
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointCorruptError, match="no checkpoint here is intact"):
        Attempt(layout).checkpointer.restore(Loops())


def test_a_damaged_newest_is_set_aside_and_told(layout):
    first = Attempt(layout)
    first.save(0)
    first.save(1)
    path = layout.checkpoints / "checkpoint_epoch0001.pt"
    path.write_bytes(path.read_bytes()[:-1])
    second = Attempt(layout, seed=3)
    assert second.checkpointer.restore(Loops()).place.position.epoch == 0
    assert [event["event"] for event in second.ledger.events()] == ["saved", "saved", "damaged"]
    assert (layout.damaged / path.name).exists()


class Positions(IterableDataset):
    """Keeps its place in tensors, as a shuffle buffer does."""

    def __init__(self, size=8):
        self.order = torch.randperm(size)

    def __iter__(self):
        return iter(self.order)

    def state_dict(self):
        return {"order": self.order}

    def load_state_dict(self, state):
        self.order = state["order"]


def streaming(size=8):
    loops = Loops()
    loops.add(*make_loader(Positions(size), Share(0, 1, 0, 0), batch_size=2))
    return loops


def in_memory():
    """Return what of images of files this process has open or mapped."""
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:hpcckpt" in line]
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return mapped + [link for link in links if "memfd:hpcckpt" in os.readlink(link)]


class Deleting:
    """Deletes a file while it is loaded."""

    def __init__(self, path=None):
        self.path = path

    def state_dict(self):
        return {"number": 1}

    def load_state_dict(self, _):
        self.path.unlink()


def test_a_file_that_goes_away_behind_the_load_is_no_error(layout):
    """Another run's, which deletes it: this rank alone would fail, and the others wait for it."""
    first = Attempt(layout, model=nn.Linear(3, 4), other=Deleting())
    first.save(0)
    (path,) = layout.checkpoints.glob("*.pt")
    prepared = []
    background = type("Background", (), {"prepare": lambda _, size: prepared.append(size)})()
    second = Attempt(layout, model=nn.Linear(3, 4), other=Deleting(path))
    second.checkpointer._background = background
    restored = second.checkpointer.restore(Loops())
    assert restored.place.position.epoch == 0
    assert not path.exists()
    assert prepared == []


def test_nothing_of_the_file_stays_in_memory_not_even_for_the_place_in_a_stream(layout):
    loops = streaming()
    place, loop = loops.create(loops._loaders[0][0], 0)
    loops.begin(place, loop, 0)
    batches = iter(loops._loaders[0][0])
    next(batches)
    place.advance()
    loops.step()
    first = Attempt(layout, **trained())
    first.checkpointer.save(Position(0, 1, epoch_finished=False), {"loss": 1.0}, loops, "test")
    before = in_memory()
    second = Attempt(layout, seed=3, **trained())
    second.store.shelf = Shelf()
    second.checkpointer.origin()
    assert len(in_memory()) > len(before), "it is not kept until it is loaded"
    restored = second.checkpointer.restore(streaming())
    (state,) = restored.place.loaders["0"]["states"]
    assert any(isinstance(value, torch.Tensor) for value in plain_tensors(state))
    assert in_memory() == before
    restored.put_back()
    assert in_memory() == before


def trained():
    model = nn.Linear(30, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(30)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def test_what_was_restored_is_not_mapped_from_the_file_any_more(layout):
    """A file that changes on disk later must not change training."""
    parameter = nn.Parameter(torch.ones(2000))
    model, optimizer = nn.Module(), torch.optim.Adam([parameter])
    model.register_parameter("weight", parameter)
    parameter.grad = torch.ones(2000)
    optimizer.step()
    first = Attempt(layout, model=model, optimizer=optimizer)
    first.save(0)
    again = nn.Parameter(torch.zeros(2000))
    other, other_optimizer = nn.Module(), torch.optim.Adam([again])
    other.register_parameter("weight", again)
    Attempt(layout, model=other, optimizer=other_optimizer).checkpointer.restore(Loops())
    path = layout.checkpoints / "checkpoint_epoch0000.pt"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(again, parameter)
    assert torch.equal(other_optimizer.state[again]["exp_avg"], optimizer.state[parameter]["exp_avg"])
