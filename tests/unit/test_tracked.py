"""Tracked objects: real optimizers, schedulers and their like go on after a restore as if nothing had happened."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from hpcckpt.errors import CheckpointMismatchError, CheckpointSaveError, UsageError
from hpcckpt.state.tracked import Stateful, Tracked

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SGD-momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam-amsgrad": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    "Adam-tensor-lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.05)),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.05),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.05),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.05, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
}
SCHEDULERS = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda epoch: 1 - 0.01 * epoch),
    "StepLR": lambda o: lr.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 6, 6, 8], gamma=0.5),
    "ConstantLR": lambda o: lr.ConstantLR(o, factor=0.5, total_iters=7),
    "LinearLR": lambda o: lr.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, total_iters=12, power=2.0),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR-scaled": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda cycle: 0.8**cycle),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.5),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.LinearLR(o, total_iters=4), lr.MultiStepLR(o, [6, 8])]),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, total_iters=4), lr.CosineAnnealingLR(o, 9)], [4]),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=9),
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Training:
    """A small training whose every step depends on all of its state."""

    def __init__(self, optimizer="SGD-momentum", scheduler="ConstantLR"):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.done = 0

    def tracked(self):
        tracked = Tracked()
        for name in ("model", "optimizer", "scheduler", "scaler", "averaged"):
            tracked.add(name, getattr(self, name))
        return tracked

    def train(self, steps):
        """Return what a difference would show in."""
        history = []
        for _ in range(steps):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.done))
            loss = self.loss(inputs)
            if isinstance(self.optimizer, torch.optim.LBFGS):
                self.optimizer.step(partial(self.loss, inputs))
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.averaged.update_parameters(self.model)
            if isinstance(self.scheduler, lr.ReduceLROnPlateau):
                self.scheduler.step((self.done % 3) / 10)
            else:
                self.scheduler.step()
            self.done += 1
            weights = [tensor.clone() for model in (self.model, self.averaged) for tensor in model.state_dict().values()]
            history.append((loss.detach(), *weights, float(self.optimizer.param_groups[0]["lr"]), self.scaler.get_scale()))
        return history

    def loss(self, inputs):
        self.optimizer.zero_grad()
        loss = self.model(inputs).square().mean()
        scaled = loss if isinstance(self.optimizer, torch.optim.LBFGS) else self.scaler.scale(loss)
        scaled.backward()
        return loss


def check_it_goes_on(before, after):
    before.train(5)
    state = through_a_file(before.tracked().state())
    expected = before.train(7)
    after.tracked().load(state)
    after.done = 5
    found = after.train(7)
    for left, right in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_bits(name):
    check_it_goes_on(Training(optimizer=name), Training(optimizer=name))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_with_the_same_bits(name):
    check_it_goes_on(Training(scheduler=name), Training(scheduler=name))


def test_a_milestone_scheduler_can_still_be_stepped_to_an_epoch():
    before, after = Training(scheduler="MultiStepLR"), Training(scheduler="MultiStepLR")
    after.tracked().load(through_a_file(before.tracked().state()))
    with pytest.warns(UserWarning, match="epoch parameter|before `optimizer.step"):  # torch's own
        after.scheduler.step(7)
    assert after.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_a_scaler_keeps_its_scale(enabled):
    scaler, restored = (torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled) for scale in (8.0, 2.0))
    tracked, target = Tracked(), Tracked()
    tracked.add("scaler", scaler)
    target.add("scaler", restored)
    target.load(through_a_file(tracked.state()))
    assert restored.state_dict() == scaler.state_dict()


class Counting:
    """The least that can be tracked."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_an_object_of_the_users_own_is_restored():
    tracked, counting = Tracked(), Counting(3)
    tracked.add("counting", counting)
    state = through_a_file(tracked.state())
    assert state == {"counting_state_dict": {"count": 3}}
    counting.count = 5
    tracked.load(state)
    assert counting.count == 3


def test_the_small_state_holds_no_weights_and_no_momentum():
    small = Training().tracked().small_state()
    assert set(small) == {"optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict"}
    assert set(small["optimizer_state_dict"]) == {"param_groups"}


def test_the_small_state_does_not_change_with_the_training():
    training = Training(scheduler="SequentialLR")
    small = training.tracked().small_state()
    kept = copy.deepcopy(small)
    training.train(3)
    assert small == kept
    assert training.tracked().small_state() != kept


@pytest.mark.parametrize("optimizer", ["SGD-momentum", "Adam-tensor-lr"])
@pytest.mark.parametrize("scheduler", ["SequentialLR", "ExponentialLR"])
def test_a_boundary_takes_back_what_schedulers_did_after_it(optimizer, scheduler):
    training = Training(optimizer, scheduler)
    training.train(2)
    expected = through_a_file(training.tracked().state())
    boundary = training.tracked().small_state()
    training.scheduler.step()
    assert repr(training.tracked().state()["optimizer_state_dict"]) != repr(expected["optimizer_state_dict"])
    found = through_a_file(training.tracked().state(boundary))
    for key in ("optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict"):
        assert repr(found[key]) == repr(expected[key])


def test_a_boundary_takes_back_what_was_added_after_it():
    tracked, seen = Tracked(), Counting()
    tracked.add("seen", seen)
    seen.count = {"a": 1}
    boundary = tracked.small_state()
    seen.count = {"a": 2, "b": 1}
    seen.state_dict = lambda: {"count": seen.count, "more": 1}
    assert tracked.state(boundary)["seen_state_dict"] == {"count": {"a": 1}}


def test_weights_only_restores_modules_and_nothing_else():
    before, after = Training(), Training()
    before.train(5)
    untouched = copy.deepcopy([after.optimizer.state_dict(), after.scheduler.state_dict(), after.scaler.state_dict()])
    after.tracked().load(through_a_file(before.tracked().state()), weights_only=True)
    assert [after.optimizer.state_dict(), after.scheduler.state_dict(), after.scaler.state_dict()] == untouched
    for name in ("model", "averaged"):
        expected, found = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


class Half:
    def state_dict(self):
        return {}


@pytest.mark.parametrize("value", [object(), None, 3, [nn.Linear(1, 1)], Half()], ids=str)
def test_what_has_no_state_is_refused(value):
    assert not isinstance(value, Stateful)
    with pytest.raises(UsageError, match=r"run\.track\(thing=…\): .* has no state_dict and load_state_dict"):
        Tracked().add("thing", value)


def test_a_name_is_taken_once():
    tracked = Tracked()
    assert not tracked
    tracked.add("model", Counting())
    assert tracked
    with pytest.raises(UsageError, match="model is tracked already"):
        tracked.add("model", Counting())


def test_state_that_could_not_be_read_back_is_refused_when_it_is_tracked():
    tracked = Tracked()
    with pytest.raises(CheckpointSaveError, match=r"^seen\.count holds a builtins\.set"):
        tracked.add("seen", Counting({1}))
    assert not tracked


def other_parameters(after):
    return through_a_file(after.tracked().state()) | {
        "optimizer_state_dict": torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}], lr=1).state_dict()
    }


MISFITS = {
    "nothing under this name": (
        lambda _: {"other_state_dict": {}, "more_state_dict": {}},
        "no state for 'model'; it has other, more: ",
    ),
    "another model": (lambda _: Training().tracked().state() | {"model_state_dict": {}}, r"^model: the checkpoint does not fit the model"),
    "another optimizer": (other_parameters, r"^optimizer: a SGD did not take its saved state \(ValueError: "),
    "a scaler that was disabled": (
        lambda after: after.tracked().state() | {"scaler_state_dict": {}},
        r"^scaler: a GradScaler did not take its saved state \(RuntimeError: ",
    ),
    "another scheduler": (
        lambda after: after.tracked().state() | {"scheduler_state_dict": {"_schedulers": [{}] * 5}},
        r"^scheduler: a SequentialLR did not take its saved state \(IndexError: ",
    ),
}


@pytest.mark.parametrize(("state", "message"), MISFITS.values(), ids=MISFITS)
def test_state_that_does_not_fit_names_the_object(state, message):
    after = Training(scheduler="SequentialLR")
    with pytest.raises(CheckpointMismatchError, match=message):
        after.tracked().load(state(after))


def test_the_wrapper_is_that_of_the_model_or_of_the_first_module():
    tracked = Tracked()
    assert tracked.wrapper() == "none"
    tracked.add("teacher", nn.DataParallel(nn.Linear(1, 1)))
    assert tracked.wrapper() == "DataParallel"
    tracked.add("model", nn.Linear(1, 1))
    assert tracked.wrapper() == "none"
    assert len(tracked.modules()) == 2
