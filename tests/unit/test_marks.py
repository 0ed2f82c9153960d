"""What counts as a change of a module between two training steps, and what does not."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from hpcckpt.state.marks import changed_since, marked


@pytest.fixture
def modules():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    return {"model": model, "average": AveragedModel(model), "other": nn.Linear(1, 1)}


def step(model):
    model(torch.randn(4, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_nothing_has_changed_right_behind_the_mark(modules):
    assert changed_since(marked(modules), modules) == []


def weights_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def through_data(module, weights):
    for parameter, value in zip(module.parameters(), weights, strict=True):
        parameter.data.copy_(value)


def swapped_in_and_out(modules):
    own = weights_of(modules["model"])
    through_data(modules["model"], [torch.zeros_like(value) for value in own])
    modules["model"].load_state_dict(
        {**modules["model"].state_dict(), **dict(zip(dict(modules["model"].named_parameters()), own, strict=True))}
    )


CHANGES = {
    "a training step": (lambda m: step(m["model"]), ["model"]),
    "a forward pass in training mode, which counts in BatchNorm": (lambda m: m["model"](torch.randn(4, 2)), ["model"]),
    "an average": (lambda m: m["average"].update_parameters(m["model"]), ["average"]),
    "statistics made anew": (lambda m: update_bn([torch.randn(4, 2)], m["average"]), ["average"]),
    "other weights": (lambda m: m["other"].load_state_dict(nn.Linear(1, 1).state_dict()), ["other"]),
    "an average through .data": (lambda m: m["other"].weight.data.mul_(0.9), ["other"]),
    "a parameter that was replaced": (lambda m: setattr(m["other"], "bias", nn.Parameter(torch.ones(1))), ["other"]),
    "its memory replaced": (lambda m: setattr(m["other"].bias, "data", torch.ones(1)), ["other"]),
    "one that has gone": (lambda m: setattr(m["other"], "bias", None), ["other"]),
    "the smallest one": (lambda m: m["other"].bias.data.copy_(torch.nextafter(m["other"].bias.data, torch.ones(1) * 9)), ["other"]),
    "two at once": (lambda m: (step(m["model"]), m["other"].weight.data.zero_()), ["model", "other"]),
}
NO_CHANGES = {
    "a forward pass in evaluation mode": lambda m: m["model"].eval()(torch.randn(4, 2)),
    "gradients": lambda m: m["other"](torch.ones(1, 1)).sum().backward(),
    "the mode": lambda m: m["model"].train(mode=False),
    "buffers written with what they hold, as DDP does before each forward pass": lambda m: [
        buffer.copy_(buffer.clone()) for buffer in m["model"].buffers()
    ],
    "its own state loaded": lambda m: m["model"].load_state_dict(m["model"].state_dict()),
    "other weights for a while, and then its own": swapped_in_and_out,
    "the same weights elsewhere": lambda m: setattr(m["other"].bias, "data", m["other"].bias.data.clone()),
    "frozen parameters": lambda m: m["model"].requires_grad_(requires_grad=False),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_a_change_is_seen_and_named(modules, change):
    act, names = change
    mark = marked(modules)
    act(modules)
    assert changed_since(mark, modules) == names
    assert changed_since(marked(modules), modules) == []


@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in NO_CHANGES.items()])
def test_what_leaves_all_values_alone_is_no_change(modules, act):
    mark = marked(modules)
    act(modules)
    assert changed_since(mark, modules) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_buffers_of_any_type_are_compared(dtype):
    module = nn.Module()
    module.register_buffer("values", torch.ones(3).to(dtype))
    mark = marked({"it": module})
    assert changed_since(mark, {"it": module}) == []
    module.values[1] = 0
    assert changed_since(mark, {"it": module}) == ["it"]


def test_a_buffer_with_nan_is_the_same_as_long_as_nothing_else_changes():
    module = nn.Module()
    module.register_buffer("values", torch.tensor([float("nan"), 1.0]))
    mark = marked({"it": module})
    assert changed_since(mark, {"it": module}) == []
    module.values[1] = float("nan")
    assert changed_since(mark, {"it": module}) == ["it"]
    mark = marked({"it": module})
    module.values[0] = 1.0
    assert changed_since(mark, {"it": module}) == ["it"]


@pytest.mark.parametrize("new", [torch.ones(2), torch.ones(3, dtype=torch.float64), None], ids=["shape", "type", "gone"])
def test_a_buffer_that_became_another_one_is_a_change(new):
    module = nn.Module()
    module.register_buffer("values", torch.ones(3))
    mark = marked({"it": module})
    module.values = new
    assert changed_since(mark, {"it": module}) == ["it"]


def test_a_buffer_that_has_come_is_a_change():
    module = nn.Linear(1, 1)
    mark = marked({"it": module})
    module.register_buffer("values", torch.ones(3))
    assert changed_since(mark, {"it": module}) == ["it"]


NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128, torch.int8)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_parameters_of_any_type_and_layout_are_compared(dtype, shape, transposed):
    values = torch.arange(float(shape[0] * shape[1])).reshape(shape)

    def laid_out(values):
        return values.to(dtype).t() if transposed else values.to(dtype)

    module = nn.Module()
    module.it = nn.Parameter(laid_out(values), requires_grad=False)
    mark = marked({"it": module})
    assert changed_since(mark, {"it": module}) == []
    module.it.data = laid_out(values + torch.eye(*shape))
    assert changed_since(mark, {"it": module}) == (["it"] if shape[0] else [])


def test_parameters_made_for_inference_and_those_without_values_yet_are_no_trouble():
    with torch.inference_mode():
        modules = {"inference": nn.Linear(1, 1)}
    modules["lazy"] = nn.LazyLinear(3)
    mark = marked(modules)
    assert changed_since(mark, modules) == []
    modules["lazy"](torch.ones(1, 2))
    assert changed_since(mark, modules) == ["lazy"]


def test_a_mark_holds_a_number_for_each_parameter_and_buffer_and_keeps_none_alive():
    mark = marked({"it": nn.BatchNorm1d(100)})
    assert [type(number) for number in mark["it"]] == [int] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("offset", range(1, 9))
def test_parameters_that_begin_anywhere_in_their_memory_are_compared(dtype, offset):
    module = nn.Module()
    module.it = nn.Parameter(torch.zeros(32, dtype=dtype)[offset : offset + 16], requires_grad=False)
    mark = marked({"it": module})
    assert changed_since(mark, {"it": module}) == []
    module.it.data[7] = 1
    assert changed_since(mark, {"it": module}) == ["it"]


def test_conjugated_and_sparse_buffers_are_no_trouble():
    module = nn.Module()
    module.register_buffer("conjugated", torch.ones(4, dtype=torch.complex64).conj())
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    mark = marked({"it": module})
    assert changed_since(mark, {"it": module}) == []
    module.conjugated.mul_(2)
    assert changed_since(mark, {"it": module}) == ["it"]
