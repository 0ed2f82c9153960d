"""Model state under portable names: any wrapper saves, any other one loads."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.model import load_model_state, model_state, portable_names, unwrap, wrapper_name


class Net(nn.Module):
    """Submodules with the names that wrappers use, tied weights, and both kinds of buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(3, 3)})
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.module.weight
        self.register_buffer("scale", torch.randn(2))
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.head(self._orig_mod["module"](self.module(self.body(x)))) * self.scale.sum() + self.scratch.sum()


PLAIN_NAMES = [
    *("scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"),
    *("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked", "body.2.weight", "body.2.bias"),
    *("module.weight", "module.bias", "_orig_mod.module.weight", "_orig_mod.module.bias", "head.weight"),
]


def compiled(module):
    return torch.compile(module, backend="eager")


def with_parts_wrapped(module):
    module.body[0] = compiled(module.body[0])
    module.module = DataParallel(module.module)
    module._orig_mod = compiled(module._orig_mod)
    return module


WRAPPERS = {
    "plain": lambda module: module,
    "dp": DataParallel,
    "ddp": DistributedDataParallel,
    "compiled": compiled,
    "ddp-of-compiled": lambda module: DistributedDataParallel(compiled(module)),
    "compiled-ddp": lambda module: compiled(DistributedDataParallel(module)),
    "dp-of-compiled": lambda module: DataParallel(compiled(module)),
    "compiled-dp": lambda module: compiled(DataParallel(module)),
    "compiled-ddp-of-compiled": lambda module: compiled(DistributedDataParallel(compiled(module))),
    "parts": with_parts_wrapped,
    "ddp-of-parts": lambda module: DistributedDataParallel(with_parts_wrapped(module)),
}
any_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@any_wrapper
def test_no_wrapper_shows_in_the_names(wrap):
    assert list(model_state(wrap(Net()))) == PLAIN_NAMES


@pytest.mark.parametrize("wrap_target", WRAPPERS.values(), ids=WRAPPERS)
@any_wrapper
def test_state_saved_from_any_wrapper_loads_into_any_other(wrap, wrap_target):
    saved = {name: tensor.clone() for name, tensor in model_state(wrap(Net())).items()}
    target = wrap_target(Net())
    assert not same(model_state(target), saved)
    load_model_state(target, saved)
    assert same(model_state(target), saved)


def test_every_key_of_the_state_dict_has_a_name():
    model = WRAPPERS["compiled-ddp"](Net())
    assert list(portable_names(model)) == list(model.state_dict())
    assert portable_names(model)["_orig_mod.module.module.weight"] == "module.weight"


def test_a_compiled_submodule_loses_its_prefix():
    model = nn.Sequential(compiled(nn.Linear(2, 2, bias=False)), nn.Linear(2, 2, bias=False))
    assert portable_names(model) == {"0._orig_mod.weight": "0.weight", "1.weight": "1.weight"}


def test_a_compiled_submodule_in_two_places_loses_its_prefix_in_both():
    shared = compiled(nn.Linear(2, 2, bias=False))
    assert list(model_state(nn.ModuleDict({"left": shared, "right": shared}))) == ["left.weight", "right.weight"]


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
@pytest.mark.parametrize("wrap", [WRAPPERS["plain"], WRAPPERS["ddp"], WRAPPERS["compiled"]], ids=["plain", "ddp", "compiled"])
def test_a_submodule_keeps_the_name_its_author_gave_it(name, wrap):
    model = nn.Module()
    model.add_module(name, nn.Linear(2, 2, bias=False))
    assert list(model_state(wrap(model))) == [f"{name}.weight"]


def test_a_model_that_contains_another_one_keeps_its_structure():
    averaged = AveragedModel(compiled(nn.Linear(2, 2, bias=False)))
    assert list(model_state(averaged)) == ["n_averaged", "module.weight"]


@pytest.mark.parametrize("name", ["plain", "dp", "compiled", "compiled-dp"])
def test_an_empty_model_has_an_empty_state(name):
    model = WRAPPERS[name](nn.Module())
    assert model_state(model) == {}
    load_model_state(model, {})


@any_wrapper
def test_tied_parameters_are_still_tied_after_loading(wrap):
    saved = {name: tensor.clone() for name, tensor in model_state(wrap(Net())).items()}
    target = wrap(Net())
    load_model_state(target, saved)
    own = unwrap(target)
    assert own.head.weight is unwrap(own.module).weight
    assert torch.equal(own.head.weight, saved["head.weight"])


def test_a_buffer_that_is_not_persistent_is_neither_saved_nor_changed():
    target = Net()
    before = target.scratch.clone()
    load_model_state(target, model_state(Net()))
    assert torch.equal(target.scratch, before)


def test_the_state_shares_memory_with_the_model():
    model = Net()
    with torch.no_grad():
        model.body[0].bias.fill_(7)
    state = model_state(model)
    assert state["body.0.bias"].data_ptr() == model.body[0].bias.data_ptr()


MISMATCHES = {
    "missing": (lambda state: state.pop("body.0.bias"), r"it lacks body\.0\.bias;"),
    "unexpected": (lambda state: state.update(extra=torch.zeros(1)), "the model has no extra;"),
    "shape": (lambda state: state.update({"head.weight": torch.zeros(5, 3)}), r"shapes differ: head\.weight \(5, 3\) for \(3, 3\)"),
    "a scalar for a vector": (lambda state: state.update(scale=torch.tensor(1.0)), r"scale \(\) for \(2,\)"),
    "many": (lambda state: state.clear(), r"it lacks scale, body\.0\.weight, .* and 10 more"),
}


@pytest.mark.parametrize(("spoil", "message"), MISMATCHES.values(), ids=MISMATCHES)
@pytest.mark.parametrize("name", ["plain", "compiled-ddp"])
def test_state_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded(name, spoil, message):
    state = model_state(Net())
    spoil(state)
    target = WRAPPERS[name](Net())
    before = {key: tensor.clone() for key, tensor in model_state(target).items()}
    with pytest.raises(CheckpointMismatchError, match=message):
        load_model_state(target, state)
    assert same(model_state(target), before)


def test_all_that_does_not_fit_is_said_at_once():
    state = model_state(Net())
    del state["scale"]
    state |= {"extra": torch.zeros(1), "head.weight": torch.zeros(5, 3)}
    with pytest.raises(CheckpointMismatchError, match=r"it lacks scale; the model has no extra; shapes differ: head\.weight"):
        load_model_state(Net(), state)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "none"),
        ("parts", "none"),
        ("dp", "DataParallel"),
        ("compiled-ddp", "OptimizedModule+DistributedDataParallel"),
        ("ddp-of-compiled", "DistributedDataParallel+OptimizedModule"),
    ],
)
def test_wrappers_are_named_from_the_outside_in(name, words):
    assert wrapper_name(WRAPPERS[name](Net())) == words


@any_wrapper
def test_unwrap_returns_the_module_itself(wrap):
    model = Net()
    assert unwrap(wrap(model)) is model
