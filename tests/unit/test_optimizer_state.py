"""Optimizer state by name: it finds its parameters in any order and grouping, keeps its bits, and fits or is refused whole."""

import copy
import io
import math
import time

import pytest
import torch
from torch import nn

from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.model import parameter_names
from hpcckpt.state.optimizer import check_optimizer_state, load_optimizer_state, optimizer_state

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "SGD without momentum": lambda params: torch.optim.SGD(params, lr=0.05),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    "Adam tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.05), foreach=False),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.05, foreach=True),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
}
any_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)))


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(
            torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        ).square().mean().backward()
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(make=OPTIMIZERS["AdamW foreach"], groups=lambda model: model.parameters(), model=None):
    torch.manual_seed(1)
    model = model or Net()
    optimizer = make(groups(model))
    train(model, optimizer)
    return model, optimizer


def saved(model, optimizer):
    return through_a_file(optimizer_state(optimizer, parameter_names(model)))


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return type(first) is type(second) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


def by_name(model, optimizer):
    names = parameter_names(model)
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}


def hypers(group):
    return {key: value for key, value in group.items() if key not in {"params", "param_names"}}


def memory(state):
    if isinstance(state, torch.Tensor):
        return {state.untyped_storage().data_ptr()} - {0}
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return set().union(*map(memory, values))


def fresh(make, groups=lambda model: model.parameters(), seed=2):
    torch.manual_seed(seed)
    model = Net()
    return model, make(groups(model))


def reversed_parameters(model):
    return list(model.parameters())[::-1]


def weights_and_biases(model):
    return [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1]},
        {"params": []},
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 2]},
    ]


GROUPINGS = {"the same": lambda model: model.parameters(), "reversed": reversed_parameters, "other groups": weights_and_biases}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@any_optimizer
def test_state_finds_its_parameters_by_name_and_keeps_its_bits(make, groups):
    model, optimizer = trained(make)
    state = saved(model, optimizer)
    target_model, target = fresh(make, groups)
    load_optimizer_state(target, state, parameter_names(target_model))
    assert equal(by_name(target_model, target), by_name(model, optimizer))
    for group in target.param_groups:
        if group["params"]:
            assert equal(hypers(group), hypers(optimizer.param_groups[0]))
        assert "param_names" not in group
    assert not memory(state) & memory(dict(target.state))
    # And both go on alike.
    target_model.load_state_dict(model.state_dict())
    train(model, optimizer, 2)
    train(target_model, target, 2)
    assert equal(dict(model.state_dict()), dict(target_model.state_dict()))


@any_optimizer
def test_the_layout_is_torchs_and_torch_alone_reads_it(make):
    model, optimizer = trained(make)
    state = saved(model, optimizer)
    assert state["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert equal(state["state"], through_a_file(optimizer.state_dict())["state"])
    target_model, target = fresh(make)
    target.load_state_dict(copy.deepcopy(state))
    assert equal(by_name(target_model, target), by_name(model, optimizer))


@pytest.mark.parametrize("names", [{}, "of another model"], ids=["none", "of others"])
def test_without_names_parameters_are_matched_by_position(names):
    model, optimizer = trained()
    given = parameter_names(Net()) if names else {}
    state = through_a_file(optimizer_state(optimizer, given))
    assert "param_names" not in state["param_groups"][0]
    target_model, target = fresh(OPTIMIZERS["AdamW foreach"])
    load_optimizer_state(target, state, parameter_names(target_model))
    assert equal(by_name(target_model, target), by_name(model, optimizer))


def test_a_group_with_a_parameter_without_a_name_gets_no_names():
    model = Net()
    optimizer = torch.optim.SGD([{"params": model.first.parameters()}, {"params": [*model.last.parameters(), nn.Parameter(torch.ones(1))]}])
    groups = optimizer_state(optimizer, parameter_names(model))["param_groups"]
    assert groups[0]["param_names"] == ["first.weight", "first.bias"]
    assert "param_names" not in groups[1]


def test_names_that_are_not_unique_are_no_names():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    names = dict.fromkeys(parameter_names(model), "same")
    assert "param_names" not in optimizer_state(optimizer, names)["param_groups"][0]


def test_an_optimizers_own_names_are_replaced_in_the_file_and_kept_in_the_optimizer():
    model = nn.DataParallel(Net())
    optimizer = torch.optim.AdamW(model.named_parameters())
    state = saved(model, optimizer)
    assert state["param_groups"][0]["param_names"][0] == "first.weight"
    load_optimizer_state(optimizer, state, parameter_names(model))
    assert optimizer.param_groups[0]["param_names"][0] == "module.first.weight"
    assert "param_names" not in optimizer_state(optimizer, {})["param_groups"][0]


def test_a_group_takes_the_hyperparameters_of_the_groups_its_parameters_were_in():
    def in_two(model):
        return [{"params": model.first.parameters(), "lr": 0.3}, {"params": model.last.parameters(), "lr": 0.2, "mine": "kept"}]

    def in_four(model):
        return [{"params": [parameter]} for parameter in [model.last.bias, model.last.weight, model.first.bias, model.first.weight]]

    model, optimizer = trained(groups=in_two)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    target_model, target = fresh(OPTIMIZERS["AdamW foreach"], in_four)
    load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert [group["lr"] for group in target.param_groups] == [0.2, 0.2, 0.3, 0.3]
    assert [group.get("mine") for group in target.param_groups] == ["kept", "kept", None, None]
    assert [group.get("initial_lr") for group in target.param_groups] == [None, None, 0.5, 0.5]


def in_two_rates(model):
    return [{"params": model.first.parameters()}, {"params": model.last.parameters(), "lr": 0.2, "betas": (0.8, 0.9)}]


def without_bias(model):
    return [parameter for parameter in model.parameters() if parameter is not model.last.bias]


def first_and_last(model):
    return [*model.first.parameters(), *model.last.parameters()]


MISFITS = {
    "merged groups": (
        in_two_rates,
        first_and_last,
        r"group 0 of the optimizer has first\.weight and last\.weight, which were in groups 0 and 1 .* other values of lr, betas: ",
    ),
    "a parameter more": (without_bias, lambda model: model.parameters(), r"it has no state of last\.bias; give"),
    "a parameter less": (lambda model: model.parameters(), without_bias, r"the optimizer has no last\.bias; give"),
    "many": (lambda model: model.parameters(), lambda model: [model.last.bias], r"has no first\.weight, .*last\.weight; give"),
}


@pytest.mark.parametrize(("before", "after", "message"), MISFITS.values(), ids=MISFITS)
def test_parameters_that_do_not_fit_are_named_and_nothing_is_changed(before, after, message):
    model, optimizer = trained(groups=before)
    target_model, target = trained(groups=after)
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert equal(target.state_dict(), kept)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (without_bias, r"has 1 parameter group \(of 6 parameters\), the optimizer has 1 parameter group \(of 5 parameters\)"),
        (in_two_rates, r"the optimizer has 2 parameter groups \(of 2, 2 parameters\), and not all parameters have names"),
    ],
    ids=["numbers", "groups"],
)
def test_numbers_that_do_not_fit_by_position_are_said(groups, message):
    model, optimizer = trained()
    _, target = trained(groups=groups)
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        load_optimizer_state(target, saved(model, optimizer), {})
    assert equal(target.state_dict(), kept)


SHAPES = {
    "by name": (True, r"exp_avg of first\.weight has shape \(5, 3\) in the checkpoint, and \(4, 3\) here"),
    "by position": (False, r"exp_avg of parameter 0 has shape \(5, 3\) in the checkpoint, and \(4, 3\) here"),
}


@pytest.mark.parametrize(("named", "message"), SHAPES.values(), ids=SHAPES)
def test_state_of_another_shape_is_refused_before_anything_is_changed(named, message):
    model, optimizer = trained(model=Net(width=5))
    target_model, target = trained()
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model) if named else {})
    assert equal(target.state_dict(), kept)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS], ids=["Adafactor", "LBFGS"])
def test_factored_and_flat_state_is_checked_by_its_own_shapes(make):
    model, target_model = nn.Linear(3, 4), nn.Linear(3, 5)
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = saved(model, optimizer)
    load_optimizer_state(optimizer, state, parameter_names(model))
    with pytest.raises(CheckpointMismatchError, match=r"(row_var|d) of weight has shape"):
        load_optimizer_state(make(target_model.parameters()), state, parameter_names(target_model))
    assert not memory(state) & memory(dict(optimizer.state))


def test_a_flat_vector_over_all_parameters_needs_their_order():
    model = nn.Linear(3, 4)
    state = saved(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(CheckpointMismatchError, match=r"LBFGS keeps its state as one vector .* bias, weight were weight, bias"):
        load_optimizer_state(torch.optim.LBFGS(reversed_parameters(model)), state, parameter_names(model))


def test_frozen_and_unused_parameters_have_no_state_and_get_none():
    model, optimizer = trained()
    target_model, target = trained(groups=reversed_parameters)
    target.state[target_model.frozen.weight] = {"exp_avg": torch.ones(4, 4)}
    load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert set(by_name(target_model, target)) == {"first.weight", "first.bias", "last.weight", "last.bias"}


def test_sparse_gradients_have_state_too():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    model(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    target_model = nn.Embedding(5, 2, sparse=True)
    target = torch.optim.SparseAdam(target_model.parameters())
    load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert equal(by_name(target_model, target), by_name(model, optimizer))


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.ASGD], ids=["NAdam", "ASGD"])
def test_numbers_beside_parameters_of_low_precision_keep_their_bits(make):
    """torch's own load_state_dict rounds them to the parameter's dtype."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).to(torch.bfloat16)
    optimizer = make(model.parameters(), lr=0.0123)
    train(model, optimizer)
    target_model = nn.Linear(3, 4).to(torch.bfloat16)
    target = make(target_model.parameters())
    load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert equal(by_name(target_model, target), by_name(model, optimizer))
    naive = make(target_model.parameters())
    naive.load_state_dict(saved(model, optimizer))
    assert not equal(by_name(target_model, naive), by_name(model, optimizer))


class Averaging(torch.optim.SGD):
    """An optimizer of somebody's own, with state of any shape, nested, and of the optimizer as a whole."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "history": [torch.ones(7), (torch.zeros(2), None)],
                    "nested": {"count": 3, "half": torch.ones(1).half()},
                }
        self.state["whole"] = {"norm": torch.ones(2)}
        return super().step(closure)


def test_any_state_of_a_foreign_optimizer_is_kept():
    model, optimizer = trained(lambda params: Averaging(params, lr=0.1))
    state = saved(model, optimizer)
    target_model, target = fresh(lambda params: Averaging(params, lr=0.1), reversed_parameters)
    load_optimizer_state(target, state, parameter_names(target_model))
    assert equal(dict(target.state)["whole"], optimizer.state["whole"])
    assert equal(target.state[target_model.first.weight], optimizer.state[model.first.weight])
    assert not memory(state) & memory(dict(target.state))


class Stubborn(torch.optim.SGD):
    """Has ways of its own, and breaks off half way."""

    def state_dict(self):
        return {"mine": [torch.ones(2)]}

    def load_state_dict(self, state_dict):
        self.mine = state_dict["mine"]
        self.param_groups[0]["lr"] = 7.0
        self.state["x"] = 1
        if "bad" in state_dict:
            raise ValueError("bad")


def test_a_layout_of_its_own_is_passed_through():
    model = Net()
    optimizer = Stubborn(model.parameters(), lr=0.1)
    state = saved(model, optimizer)
    assert equal(state, {"mine": [torch.ones(2)]})
    load_optimizer_state(optimizer, state, parameter_names(model))
    assert equal(optimizer.mine, [torch.ones(2)])
    assert not memory(state) & memory(optimizer.mine)


def test_an_optimizer_that_breaks_off_keeps_its_state_and_hyperparameters():
    optimizer = Stubborn(Net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="bad"):
        load_optimizer_state(optimizer, {"mine": [], "bad": 1}, {})
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state


def test_tied_parameters_have_the_first_of_their_names():
    model = Net()
    model.last.weight = model.first.weight
    assert list(parameter_names(model).values()).count("first.weight") == 1
    assert "last.weight" not in parameter_names(model).values()


def test_parameters_without_memory_are_refused():
    model, optimizer = trained()
    target_model = Net().to("meta")
    with pytest.raises(CheckpointMismatchError, match=r"on the meta device.*to_empty"):
        load_optimizer_state(torch.optim.AdamW(target_model.parameters()), saved(model, optimizer), {})


def test_names_that_a_wrapper_shows_in_are_matched():
    model = nn.DataParallel(Net())
    optimizer = torch.optim.AdamW(model.named_parameters())
    train(model.module, optimizer)
    state = through_a_file(optimizer.state_dict())
    assert state["param_groups"][0]["param_names"][0] == "module.first.weight"
    target_model, target = fresh(OPTIMIZERS["AdamW foreach"], reversed_parameters)
    load_optimizer_state(target, state, parameter_names(target_model))
    assert equal(target.state[target_model.last.bias]["exp_avg"], optimizer.state[model.module.last.bias]["exp_avg"])


@pytest.mark.parametrize("nan", [float("nan"), torch.tensor(float("nan"))])
def test_a_hyperparameter_that_is_nan_is_the_same_in_two_groups(nan):
    model, optimizer = trained(groups=lambda model: [{"params": [parameter]} for parameter in model.parameters()])
    for group in optimizer.param_groups:
        group["last_loss"] = copy.deepcopy(nan)
    target_model, target = fresh(OPTIMIZERS["AdamW foreach"])
    load_optimizer_state(target, saved(model, optimizer), parameter_names(target_model))
    assert math.isnan(target.param_groups[0]["last_loss"])


def test_many_parameters_are_matched_by_name_in_no_time():
    model = nn.ParameterDict({f"p{index}": nn.Parameter(torch.zeros(1)) for index in range(20_000)})
    optimizer, names = torch.optim.SGD(model.parameters()), parameter_names(model)
    state = optimizer_state(optimizer, names)
    began = time.process_time()
    assert check_optimizer_state(optimizer, state, names)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("names", [7, ["first.weight", ["x"]]])
def test_what_is_no_list_of_names_is_none(names):
    model, optimizer = trained()
    state = saved(model, optimizer)
    state["param_groups"][0]["param_names"] = names
    assert check_optimizer_state(optimizer, state, parameter_names(model))
