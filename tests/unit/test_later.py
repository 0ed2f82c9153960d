"""What is copied beside forward and backward passes is the state where the training stood still, or it is told apart from that."""

import ctypes
import threading

import pytest
import torch
from torch import nn

from hpcckpt.background import Background
from hpcckpt.state import later
from hpcckpt.state.later import LaterCopy, TornError, after_first_step, changed_by_steps, hold_steps
from hpcckpt.store.durable import write_durably


def training():
    """Return a model, and an optimizer that has made a step."""
    model = nn.Sequential(nn.Linear(600, 700), nn.BatchNorm1d(700), nn.Linear(700, 600))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer


def train(model, optimizer):
    model(torch.randn(4, 600)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def bytes_of(storage):
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


class Copy:
    """A copy of a model's and an optimizer's large tensors, and what they were."""

    def __init__(self, _model, optimizer):
        self.tensors = changed_by_steps([optimizer])
        assert len(self.tensors) == 6, "two weights, and two moments of each"
        storages = [tensor.untyped_storage() for tensor in self.tensors.values()]
        places = [sum(storage.nbytes() for storage in storages[:number]) for number in range(len(storages))]
        self.expected = b"".join(bytes_of(storage) for storage in storages)
        self.target = torch.zeros(len(self.expected), dtype=torch.uint8)
        self.copy = LaterCopy(list(zip(storages, places, strict=True)), self.target.data_ptr(), self.tensors)

    def result(self):
        self.copy.wait()
        return bytes_of(self.target.untyped_storage())


@pytest.fixture
def parts():
    model, optimizer = training()
    return model, optimizer, Copy(model, optimizer)


def test_nothing_changed_in_between(parts):
    *_, copy = parts
    copy.copy.copy()
    copy.copy.confirm()
    assert copy.result() == copy.expected


def test_forward_and_backward_in_between(parts):
    model, _, copy = parts
    model(torch.randn(4, 600)).sum().backward()
    copy.copy.copy()
    copy.copy.confirm()
    assert copy.result() == copy.expected


CHANGES = {
    "in place": lambda model, _: model[0].weight.detach().mul_(2),
    "in place, of what the optimizer keeps": lambda model, optimizer: optimizer.state[model[2].weight]["exp_avg"].zero_(),
    "a step that nobody held": train,
    "a restore": lambda model, _: model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}),
    "unseen by autograd": lambda model, _: model[0].weight.data.mul_(2),
    "unseen by autograd, in one of many": lambda model, optimizer: optimizer.state[model[2].weight]["exp_avg_sq"].data.fill_(7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_before_the_copy_tears_it(parts, change):
    model, optimizer, copy = parts
    change(model, optimizer)
    copy.copy.copy()
    copy.copy.confirm()
    with pytest.raises(TornError, match="changed while"):
        copy.result()


@pytest.mark.parametrize("change", [CHANGES["in place"], CHANGES["a step that nobody held"]])
def test_a_change_that_autograd_sees_tears_it_also_where_the_copy_looks_right(parts, change):
    """It might have been made while the copy was."""
    model, optimizer, copy = parts
    copy.copy.copy()
    change(model, optimizer)
    copy.copy.confirm()
    with pytest.raises(TornError):
        copy.result()


def test_a_change_behind_the_confirmation_is_nobodys_business(parts):
    model, optimizer, copy = parts
    copy.copy.copy()
    copy.copy.confirm()
    train(model, optimizer)
    copy.copy.confirm()
    assert copy.result() == copy.expected


def test_a_step_waits_for_the_copy(parts):
    model, optimizer, copy = parts
    hold_steps([optimizer], copy.copy.confirm)
    copying = threading.Timer(0.2, copy.copy.copy)
    copying.start()
    train(model, optimizer)
    assert copy.result() == copy.expected
    copying.join()


def test_what_was_given_up_holds_no_step(parts):
    model, optimizer, copy = parts
    hold_steps([optimizer], copy.copy.confirm)
    copy.copy.give_up()
    train(model, optimizer)
    copy.copy.copy()
    assert not copy.target.any(), "it is too late for a copy"


def test_when_the_training_is_over_nothing_changes_any_more(monkeypatch):
    monkeypatch.setattr(later, "_POLL_S", 0.01)
    made = []
    thread = threading.Thread(target=lambda: made.append(Copy(*training())))
    thread.start()
    thread.join()
    made[0].copy.copy()
    assert made[0].result() == made[0].expected


def test_what_else_could_change_is_not_left_for_later():
    model, optimizer = training()
    frozen = nn.Linear(600, 600)
    small = nn.Linear(3, 3)
    swapped = torch.optim.SGD([*small.parameters(), nn.Parameter(torch.ones(3000, 3000).to_sparse())])
    tensors = changed_by_steps([optimizer, swapped])
    addresses = {tensor.untyped_storage().data_ptr() for tensor in (frozen.weight, *small.parameters(), *model.buffers())}
    assert not addresses & tensors.keys()
    assert len(tensors) == 6


@pytest.mark.parametrize("waits", [False, True], ids=["a step at once", "a forward pass before"])
def test_a_checkpoint_that_is_copied_later_holds_the_state_of_the_call(tmp_path, waits):
    background = Background(("USR1", "TERM"), print)
    model, optimizer = training()
    hold_steps([optimizer], background.before_step)
    for number in range(4):
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "number": [number]}
        expected = {name: value.clone() for name, value in content["model"].items()}
        moments = [value.clone() for state in content["optimizer"]["state"].values() for value in state.values()]
        path = tmp_path / f"{number}.pt"
        write = background.stage(content, changed_by_steps([optimizer]))
        background.start(lambda path=path, write=write: write_durably(path, write))
        content["number"].append("changed")
        model[1].running_mean.fill_(5)
        if waits:
            model(torch.randn(4, 600))
        train(model, optimizer)
        background.settle()
        loaded = torch.load(path, weights_only=True)
        assert all(torch.equal(loaded["model"][name], value) for name, value in expected.items())
        found = [value for state in loaded["optimizer"]["state"].values() for value in state.values()]
        assert all(torch.equal(one, other) for one, other in zip(found, moments, strict=True))
        assert loaded["number"] == [number]
    assert not background.is_torn
    background.close()


def test_a_torn_one_is_given_up_and_asks_for_attention(tmp_path, wait_until):
    background = Background(("USR1", "TERM"), print)
    model, optimizer = training()
    write = background.stage({"model": model.state_dict()}, changed_by_steps([optimizer]))
    with torch.no_grad():
        model[0].weight.mul_(2)
    background.start(lambda: write_durably(tmp_path / "a.pt", write))
    background.before_step()
    wait_until(lambda: background.has_failed, "somebody to be told")
    background.settle()
    assert background.is_torn
    assert list(tmp_path.iterdir()) == []
    background.close()


def test_a_save_that_never_comes_to_the_copy_holds_no_step():
    """One that was overtaken by a newer attempt, say."""
    background = Background(("USR1", "TERM"), print)
    model, optimizer = training()
    hold_steps([optimizer], background.before_step)
    assert background.stage({"model": model.state_dict()}, changed_by_steps([optimizer])) is not None

    def save():
        raise OSError("before anything was written")

    background.start(save)
    train(model, optimizer)
    with pytest.raises(OSError, match="before anything"):
        background.settle()
    background.close()


def test_where_no_thread_can_be_had_it_is_copied_by_the_training(tmp_path, monkeypatch):
    background = Background(("USR1", "TERM"), print)
    model, optimizer = training()
    write = background.stage({"model": model.state_dict()}, changed_by_steps([optimizer]))

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        background.start(lambda: write_durably(tmp_path / "a.pt", write))
    background.settle()
    assert torch.equal(torch.load(tmp_path / "a.pt")["model"]["0.weight"], model[0].weight)
    background.close()


def test_something_is_done_once_behind_the_first_step():
    model, optimizer = training()
    done = []
    after_first_step(optimizer, lambda: done.append(len(optimizer.state)))
    assert done == []
    for _ in range(3):
        train(model, optimizer)
    assert done == [6]
