"""Hyperparameters that a script gives and a checkpoint overrides: all of them are told, and nothing else is."""

import copy
import io

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR

from hpcckpt.state.overridden import _same, given, overridden
from hpcckpt.state.tracked import Tracked


class Decay:
    """A callable with state of its own."""

    def __init__(self, base):
        self.base = base

    def __call__(self, step):
        return self.base**step


class Fading(lr.LRScheduler):
    """A user's scheduler that changes what bears the name of an argument."""

    def __init__(self, optimizer, strength, last_epoch=-1):
        self.strength = strength
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        self.strength *= 0.9
        return [base * self.strength for base in self.base_lrs]


OPTIMIZERS = {
    **{name: getattr(torch.optim, name) for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)},
    "SGD-momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam-tensor-lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.05), betas=(torch.tensor(0.8), torch.tensor(0.9))),
    "Adam-amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True, foreach=True),
}
del OPTIMIZERS["Optimizer"]
SCHEDULERS = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR-callable": lambda o: lr.LambdaLR(o, Decay(0.9)),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda epoch: 1 - 0.01 * epoch),
    "StepLR": lambda o: lr.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 6, 6, 8], gamma=0.5),
    "ConstantLR": lambda o: lr.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lr.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3, step_size_down=2, mode="exp_range", gamma=0.99),
    "CyclicLR-own-scale": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.9**x),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=30),
    "OneCycleLR-three-phase": lambda o: lr.OneCycleLR(o, 0.1, epochs=3, steps_per_epoch=10, three_phase=True, pct_start=0.2),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=1, cooldown=1, min_lr=1e-4),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, total_iters=3), lr.CosineAnnealingWarmRestarts(o, 3)], milestones=[3]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, total_iters=3), lr.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
    "Fading": lambda o: Fading(o, 1.0),
}


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def made(make_optimizer=sgd, make_scheduler=None, groups=2):
    """Return what a script makes: objects by name."""
    torch.manual_seed(3)
    layers = [nn.Linear(3, 3, bias=False) for _ in range(groups)]
    is_single = getattr(make_optimizer, "__name__", "") == "LBFGS" or groups == 1
    params = (
        [p for layer in layers for p in layer.parameters()] if is_single else [{"params": list(layer.parameters())} for layer in layers]
    )
    optimizer = make_optimizer(params)
    objects = {"model": nn.Sequential(*layers), "optimizer": optimizer}
    return objects if make_scheduler is None else {**objects, "scheduler": make_scheduler(optimizer)}


def step(objects, number):
    def closure():
        objects["optimizer"].zero_grad()
        loss = objects["model"](torch.ones(2, 3)).square().sum()
        loss.backward()
        if type(objects["optimizer"]) is torch.optim.SparseAdam:
            for parameter in objects["model"].parameters():
                parameter.grad = parameter.grad.to_sparse()
        return loss

    if isinstance(objects["optimizer"], torch.optim.LBFGS):
        objects["optimizer"].step(closure)
    else:
        closure()
        objects["optimizer"].step()
    scheduler = objects.get("scheduler")
    if isinstance(scheduler, lr.ReduceLROnPlateau):
        scheduler.step(1.0 + number)  # never better
    elif scheduler is not None:
        scheduler.step()


def restored(there, here):
    """Load all of `there` into `here`, and return what was overridden."""
    snapshot = given(here)
    load(there, here)
    return overridden(snapshot, here)


def load(there, here):
    """Save and restore as a run does."""
    file = io.BytesIO()
    torch.save(tracked(there).state(), file)
    file.seek(0)
    tracked(here).load(torch.load(file, weights_only=True))


def tracked(objects):
    those = Tracked()
    for name, value in objects.items():
        those.add(name, value)
    return those


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unchanged_script_is_told_nothing_whatever_its_optimizer_and_however_far_it_is(name):
    running = made(OPTIMIZERS[name])
    for number in range(6):
        here = made(OPTIMIZERS[name])
        assert any(key.startswith("optimizer/") for key in given(here))
        assert restored(running, here) == []
        step(running, number)


@pytest.mark.parametrize("make_optimizer", [sgd, torch.optim.AdamW])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unchanged_script_is_told_nothing_whatever_its_scheduler_and_however_far_it_is(name, make_optimizer):
    running = made(make_optimizer, SCHEDULERS[name])
    rates = set()
    for number in range(15):
        assert restored(running, made(make_optimizer, SCHEDULERS[name])) == []
        rates.add(running["optimizer"].param_groups[0]["lr"])
        step(running, number)
    assert len(rates) > 1  # it did change something


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unchanged_script_that_is_restored_again_and_again_is_told_nothing(name):
    objects = made(sgd, SCHEDULERS[name])
    first = given(objects)
    for number in range(8):
        step(objects, number)
        here = made(sgd, SCHEDULERS[name])
        snapshot = given(here)
        load(objects, here)
        assert overridden(snapshot, here, first) == []
        objects = here


def test_every_optimizer_and_scheduler_of_torch_is_among_the_tested_ones():
    here = {name.partition("-")[0] for name in (*OPTIMIZERS, *SCHEDULERS)}
    classes = {name for module in (torch.optim, lr) for name in module.__all__ if isinstance(getattr(module, name), type)}
    assert classes - {"Optimizer", "LRScheduler"} <= here


def test_a_raised_number_of_epochs_is_told():
    running = made(sgd, lambda o: lr.CosineAnnealingLR(o, T_max=12))
    step(running, 0)
    here = made(sgd, lambda o: lr.CosineAnnealingLR(o, T_max=20))
    assert restored(running, here) == ["scheduler: T_max is 12 as in the checkpoint, not 20 as in the script"]
    assert here["scheduler"].T_max == 12


CHANGED = {
    "StepLR": (lr.StepLR, 3, 4, ["step_size is 3"]),
    "MultiStepLR": (lr.MultiStepLR, [2, 6, 6], [2, 7], ["milestones is (2, 6, 6) as in the checkpoint, not (2, 7)"]),
    "ConstantLR": (lr.ConstantLR, 0.5, 0.25, ["factor is 0.5"]),
    "LinearLR": (lambda o, v: lr.LinearLR(o, total_iters=v), 5, 9, ["total_iters is 5"]),
    "ExponentialLR": (lr.ExponentialLR, 0.9, 0.8, ["gamma is 0.9"]),
    "PolynomialLR": (lambda o, v: lr.PolynomialLR(o, 5, v), 1.0, 2.0, ["power is 1.0"]),
    "WarmRestarts": (lr.CosineAnnealingWarmRestarts, 3, 5, ["T_0 is 3"]),
    "CyclicLR": (lambda o, v: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3, step_size_down=v), 5, 9, ["step_size_down is 5.0"]),
    "CyclicLR-max": (
        lambda o, v: lr.CyclicLR(o, 0.01, v, step_size_up=3),
        0.1,
        0.2,
        ["max_lr is (0.1, 0.1) as in the checkpoint, not (0.2, 0.2)"],
    ),
    "OneCycleLR": (lambda o, v: lr.OneCycleLR(o, 0.1, total_steps=v), 30, 60, ["total_steps is 30"]),
    "OneCycleLR-epochs": (lambda o, v: lr.OneCycleLR(o, 0.1, epochs=v, steps_per_epoch=5), 6, 9, ["total_steps is 30"]),
    "OneCycleLR-pct": (lambda o, v: lr.OneCycleLR(o, 0.1, total_steps=30, pct_start=v), 0.3, 0.4, ["pct_start is 0.3"]),
    "OneCycleLR-anneal": (
        lambda o, v: lr.OneCycleLR(o, 0.1, total_steps=30, anneal_strategy=v),
        "cos",
        "linear",
        ["anneal_strategy is 'cos'"],
    ),
    "OneCycleLR-phases": (lambda o, v: lr.OneCycleLR(o, 0.1, total_steps=30, three_phase=v), False, True, ["three_phase is False"]),
    "ReduceLROnPlateau": (lambda o, v: lr.ReduceLROnPlateau(o, patience=v), 3, 5, ["patience is 3"]),
    "ReduceLROnPlateau-mode": (lr.ReduceLROnPlateau, "min", "max", ["mode is 'min'"]),
    "SWALR": (lambda o, v: SWALR(o, swa_lr=0.01, anneal_strategy=v), "cos", "linear", ["anneal_strategy is 'cos'"]),
    "SequentialLR": (
        lambda o, v: lr.SequentialLR(o, [lr.LinearLR(o, total_iters=3), lr.CosineAnnealingLR(o, v)], milestones=[v // 2]),
        12,
        20,
        ["scheduler: milestones is (6,)", "scheduler, part 1 (CosineAnnealingLR): T_max is 12"],
    ),
    "ChainedScheduler": (
        lambda o, v: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, v)]),
        0.9,
        0.8,
        ["scheduler, part 1 (ExponentialLR): gamma is 0.9"],
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_every_scheduler_of_torch_tells_what_it_was_made_with(name):
    make, then, now, expected = CHANGED[name]
    running = made(sgd, lambda o: make(o, then))
    for number in range(3):
        step(running, number)
    told = restored(running, made(sgd, lambda o: make(o, now)))
    assert len(told) == len(expected)
    for sentence, part in zip(told, expected, strict=True):
        assert sentence.startswith("scheduler")
        assert part in sentence


def test_another_learning_rate_and_weight_decay_are_told_with_or_without_a_scheduler():
    def adamw(rate, decay):
        return lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=decay)

    told = [
        "optimizer: lr is 0.1 as in the checkpoint, not 0.2 as in the script",
        "optimizer: weight_decay is 0.01 as in the checkpoint, not 0.05 as in the script",
    ]
    for make_scheduler in (None, lambda o: lr.LinearLR(o, total_iters=5)):
        running = made(adamw(0.1, 0.01), make_scheduler)
        step(running, 0)
        assert restored(running, made(adamw(0.2, 0.05), make_scheduler)) == told


def test_groups_that_were_changed_are_named():
    def of(*rates):
        return lambda params: torch.optim.SGD([{**group, "lr": rate} for group, rate in zip(params, rates, strict=True)])

    assert restored(made(of(0.1, 0.2, 0.3), groups=3), made(of(0.1, 0.2, 0.4), groups=3)) == [
        "optimizer, group 2: lr is 0.3 as in the checkpoint, not 0.4 as in the script"
    ]
    assert restored(made(of(0.1, 0.1, 0.3), groups=3), made(of(0.2, 0.2, 0.3), groups=3)) == [
        "optimizer, groups 0, 1: lr is 0.1 as in the checkpoint, not 0.2 as in the script"
    ]
    assert restored(made(of(0.1, 0.2, 0.3), groups=3), made(of(1.0, 2.0, 3.0), groups=3)) == [
        "optimizer: lr is as in the checkpoint, not as in the script (group 0: 0.1, not 1.0)"
    ]


def test_a_rate_that_a_scheduler_sets_without_a_trace_is_not_taken_for_another_one():
    running = made(sgd, SCHEDULERS["ReduceLROnPlateau"])
    for number in range(6):
        step(running, number)
    assert running["optimizer"].param_groups[0]["lr"] < 0.05
    assert restored(running, made(sgd, SCHEDULERS["ReduceLROnPlateau"])) == []


def test_a_rate_that_the_script_sets_by_hand_is_told_from_another_one_by_what_the_checkpoint_was_given():
    running = made()
    first = given(running)
    running["optimizer"].param_groups[0]["lr"] = 0.01
    running["optimizer"].param_groups[1]["weight_decay"] = 0.3

    same = made()
    snapshot = given(same)
    load(running, same)
    assert overridden(snapshot, same, first) == []

    other = made(lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9))
    snapshot = given(other)
    load(running, other)
    assert overridden(snapshot, other, first) == ["optimizer: lr is as in the checkpoint, not as in the script (group 0: 0.01, not 0.5)"]


def test_a_users_own_scheduler_is_told_only_with_what_the_checkpoint_was_given():
    running = made(sgd, lambda o: Fading(o, 1.0))
    first = given(running)
    here = made(sgd, lambda o: Fading(o, 5.0))
    snapshot = given(here)
    load(running, here)
    assert overridden(snapshot, here) == []
    assert overridden(snapshot, here, first) == ["scheduler: strength is 0.9 as in the checkpoint, not 4.5 as in the script"]


def test_what_was_given_goes_through_a_file():
    objects = made(OPTIMIZERS["Adam-tensor-lr"], SCHEDULERS["SequentialLR"])
    file = io.BytesIO()
    torch.save(given(objects), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == given(objects)


def test_what_was_given_does_not_change_with_the_objects():
    objects = made(sgd, lambda o: lr.MultiStepLR(o, [2, 3]))
    snapshot = given(objects)
    before = copy.deepcopy(snapshot)
    objects["scheduler"].milestones[9] = 1
    objects["optimizer"].param_groups[0]["weight_decay"] = 7.0
    assert snapshot == before != given(objects)


class Hostile(torch.optim.SGD):
    """Nothing about it can be read."""

    @property
    def param_groups(self):
        raise RuntimeError("no")

    @param_groups.setter
    def param_groups(self, value):
        self.__dict__["hidden"] = value

    def __init__(self):
        self.__dict__["hidden"] = []


class Secretive:
    """Has an optimizer that cannot be asked for."""

    @property
    def optimizer(self):
        raise OSError("no")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Hollow(lr.LRScheduler):
    """Was never made properly, and hides what it has."""

    def __init__(self):
        pass

    @property
    def __dict__(self):
        raise RuntimeError("no")


def test_odd_objects_are_left_out_and_do_not_hide_the_others():
    def objects(decay):
        optimizer = torch.optim.SGD([torch.zeros(1)], weight_decay=decay)
        return {"hostile": Hostile(), "secretive": Secretive(), "hollow": Hollow(), "text": "text", "none": None, "optimizer": optimizer}

    there, here = objects(0.1), objects(0.2)
    snapshot = given(here)
    assert {key.partition("/")[0] for key in snapshot} == {"optimizer"}
    here["optimizer"].load_state_dict(there["optimizer"].state_dict())
    assert overridden(snapshot, here) == ["optimizer: weight_decay is 0.1 as in the checkpoint, not 0.2 as in the script"]


def test_odd_values_of_arguments_are_left_out():
    optimizer = torch.optim.SGD([torch.zeros(1)])
    scheduler = lr.StepLR(optimizer, 3)
    optimizer.param_groups[0].update(
        momentum=object(), dampening=torch.zeros(3), weight_decay=[object()], lr=torch.zeros((), device="meta")
    )
    scheduler.gamma = lambda: None
    snapshot = given({"optimizer": optimizer, "scheduler": scheduler})
    assert not {"optimizer/0/momentum", "optimizer/0/dampening", "optimizer/0/weight_decay", "scheduler//gamma"} & snapshot.keys()
    assert {"optimizer/0/lr", "optimizer/0/nesterov", "scheduler//step_size"} <= snapshot.keys()


def test_what_the_checkpoint_was_given_may_be_anything():
    running = made(sgd, lambda o: lr.StepLR(o, 3))
    here = made(sgd, lambda o: lr.StepLR(o, 4))
    snapshot = given(here)
    load(running, here)
    told = ["scheduler: step_size is 3 as in the checkpoint, not 4 as in the script"]
    assert overridden(snapshot, here, {"scheduler//step_size": torch.zeros(3), "optimizer/0/lr": object()}) == told


def test_objects_that_were_not_there_before_the_load_are_left_out():
    objects = made(sgd, SCHEDULERS["StepLR"])
    assert overridden({}, objects) == []
    assert overridden(given(objects), {}) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3).map(tuple)
)


@drawn(VALUES)
def test_every_value_is_the_same_as_itself(value):
    assert _same(value, copy.deepcopy(value))


@drawn(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_exactly_the_changed_rates_are_told(then, now):
    def objects(rate):
        optimizer = torch.optim.SGD([torch.zeros(1)])
        optimizer.param_groups[0]["lr"] = rate
        return {"optimizer": optimizer}

    there, here = objects(then), objects(now)
    assert bool(restored(there, here)) == (then != now)
