"""Model state under portable names: any wrapper saves, any other one loads."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from hpcckpt.distributed import shard_like
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.state.model import load_model_state, model_state, parameter_names, portable_names, unwrap, wrapper_name


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


def test_a_name_of_a_tied_parameter_is_enough():
    state = {name: tensor.clone() for name, tensor in model_state(Net()).items()}
    for dropped in ("head.weight", "module.weight"):
        target = Net()
        report = load_model_state(target, {name: tensor for name, tensor in state.items() if name != dropped})
        assert report.is_complete
        assert report.missing == ()
        assert set(report.loaded) == set(PLAIN_NAMES)
        assert same(model_state(target), state)
    with pytest.raises(CheckpointMismatchError, match=r"it lacks module\.weight, head\.weight;"):
        load_model_state(Net(), {name: tensor for name, tensor in state.items() if name not in {"head.weight", "module.weight"}})


def test_a_view_of_the_same_memory_is_tied_and_two_empty_tensors_are_not():
    model = nn.Module()
    model.register_buffer("one", torch.zeros(3))
    model.register_buffer("same", model.one.view(3))
    model.register_buffer("part", model.one[:2])
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("other_empty", torch.zeros(0))
    report = load_model_state(model, {"same": torch.ones(3), "empty": torch.zeros(0)}, strict=False)
    assert report.missing == ("part", "other_empty")


def test_the_names_of_parameters_are_found_by_identity():
    model = DistributedDataParallel(compiled(Net()))
    names = parameter_names(model)
    assert sorted(names[id(parameter)] for parameter in model.parameters()) == sorted(
        name for name, _ in Net().named_parameters() if name != "head.weight"
    )


@pytest.mark.parametrize("wrap", [compiled, lambda part: part], ids=["compiled", "plain"])
def test_activation_checkpointing_shows_in_no_name(wrap):
    model = nn.Sequential(checkpoint_wrapper(wrap(nn.Linear(2, 2))), nn.Linear(2, 2))
    assert list(model_state(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    saved = {name: torch.randn_like(tensor) for name, tensor in model_state(model).items()}
    load_model_state(model, saved)
    assert same(model_state(model), saved)


def test_parametrizations_are_state_like_any_other():
    torch.manual_seed(0)
    source, target = weight_norm(nn.Linear(3, 2)), compiled(weight_norm(nn.Linear(3, 2)))
    load_model_state(target, model_state(source))
    assert torch.equal(unwrap(target).weight, source.weight)


class Extra(nn.Linear):
    """Returns what it likes, a tensor whose size depends on its history as well."""

    def __init__(self, extra=None):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("extra", [{"count": [3]}, torch.ones(5, dtype=torch.uint8), None, "text"], ids=str)
@pytest.mark.parametrize("before", [None, torch.zeros(2)], ids=["none", "tensor"])
def test_extra_state_of_any_kind_is_restored_and_not_shared(extra, before):
    state = model_state(DataParallel(Extra(extra)))
    target = compiled(Extra(before))
    load_model_state(target, state)
    found = unwrap(target).extra
    assert torch.equal(found, extra) if isinstance(extra, torch.Tensor) else found == extra
    assert found is not extra or extra in {None, "text"}
    with pytest.raises(CheckpointMismatchError, match="it lacks _extra_state;"):
        load_model_state(target, {name: value for name, value in state.items() if name != "_extra_state"})


def test_something_that_is_no_tensor_is_of_another_shape():
    with pytest.raises(CheckpointMismatchError, match=r"shapes differ: weight str for \(2, 2\)"):
        load_model_state(nn.Linear(2, 2, bias=False), {"weight": "text"})


def test_old_batch_norm_state_is_incomplete_but_loads_where_that_is_allowed():
    state = {name: torch.ones_like(tensor) for name, tensor in model_state(nn.BatchNorm1d(2)).items() if name != "num_batches_tracked"}
    target = nn.BatchNorm1d(2)
    target.num_batches_tracked.fill_(4)
    with pytest.raises(CheckpointMismatchError, match="it lacks num_batches_tracked;"):
        load_model_state(target, state)
    report = load_model_state(target, state, strict=False)
    assert report.missing == ("num_batches_tracked",)
    assert torch.equal(target.running_mean, torch.ones(2))
    assert target.num_batches_tracked == 4
    absent = nn.BatchNorm1d(2, device="meta")
    assert load_model_state(absent, state, strict=False).on_meta == ()
    assert absent.num_batches_tracked == 0


class Versioned(nn.Linear):
    """Takes a state without a version for an old one, as some modules of torch do."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if (local_metadata.get("version") or 1) < 3 and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = -state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("wrap", [lambda model: model, compiled, DistributedDataParallel], ids=["plain", "compiled", "ddp"])
def test_a_complete_state_is_of_the_version_of_the_modules_class(wrap):
    source, target = Versioned(2, 2), wrap(Versioned(2, 2))
    load_model_state(target, model_state(source))
    assert torch.equal(unwrap(target).weight, source.weight)


@pytest.mark.parametrize("load", [model_state, lambda model: load_model_state(model, {}), parameter_names], ids=["save", "load", "names"])
def test_a_parameter_without_a_shape_is_named_and_what_to_do(load):
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(UsageError, match=r"^1\.weight has no shape .*: run one batch through the model before run\.track"):
        load(model)
    model(torch.ones(1, 2))
    load_model_state(model, model_state(model))


def on_meta():
    with torch.device("meta"):
        model = Net()
    model.body.requires_grad_(False)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, compiled, DataParallel], ids=["plain", "compiled", "dp"])
def test_a_model_without_memory_is_loaded_and_keeps_its_parameters(wrap):
    state = {name: tensor.clone() for name, tensor in model_state(Net()).items()}
    target = wrap(on_meta())
    own = unwrap(target)
    parameters = list(own.parameters())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    report = load_model_state(target, state)
    assert same(model_state(target), state)
    assert report.is_complete
    assert report.on_meta[0].endswith("scratch")
    assert "1 still on the meta device: " in str(report)
    assert all(left is right for left, right in zip(own.parameters(), parameters, strict=True))
    assert own.head.weight is own.module.weight
    assert not own.body[0].weight.requires_grad
    assert own.head.weight.requires_grad
    assert not any(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model_state(target).items())
    own.scratch = torch.zeros(2)
    target(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(own.head.weight, state["head.weight"])


def test_a_model_partly_without_memory_keeps_what_it_had():
    state = {name: tensor.clone() for name, tensor in model_state(Net()).items()}
    target = Net()
    target.body.to("meta")
    weight = target.module.weight
    assert load_model_state(target, state).on_meta == ()
    assert target.module.weight is weight
    assert same(model_state(target), state)


def test_a_parameter_that_somebody_watches_is_replaced_and_still_tied():
    state = {name: tensor.clone() for name, tensor in model_state(Net()).items()}
    target = on_meta()
    watched = target.head.weight
    reference = weakref.ref(watched)
    load_model_state(target, state)
    assert reference() is watched
    assert target.head.weight is target.module.weight is not watched
    assert same(model_state(target), state)


def test_what_is_not_in_the_file_stays_without_memory_and_is_said():
    target = on_meta()
    report = load_model_state(target, {"body.0.weight": torch.ones(4, 3, dtype=torch.float64)}, strict=False, cast=True)
    assert report.loaded == ("body.0.weight",)
    assert target.body[0].weight.dtype == torch.float32
    assert "body.0.bias" in report.on_meta
    assert "body.0.weight" not in report.on_meta


def on_one_rank(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def test_fully_shard_is_named_and_works_around_and_within_compile():
    for wrap, name in (
        (on_one_rank, "fully_shard"),
        (lambda model: on_one_rank(compiled(model)), "OptimizedModule+fully_shard"),
        (lambda model: compiled(on_one_rank(model)), "OptimizedModule+fully_shard"),
    ):
        saved = {key: tensor.clone() for key, tensor in model_state(Net()).items()}
        target = wrap(Net())
        assert wrapper_name(target) == name
        load_model_state(target, saved)
        assert same(model_state(target), saved)
        assert model_state(target, keep=False) == {}


def test_a_sharded_model_that_is_gathered_at_the_moment_is_still_found_sharded():
    model = on_one_rank(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters())
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert set(model_state(model)) == {"weight", "bias"}
    assert [parameter_names(model)[id(parameter)] for parameter in optimizer.param_groups[0]["params"]] == ["weight", "bias"]


@pytest.mark.parametrize(("shape", "spread"), [((4, 3), True), ((4, 1), True), ((4,), True), ((1, 3), False), ((7, 3), False), ((), False)])
def test_a_tensor_is_spread_like_another_where_it_is_as_long(shape, spread):
    own = on_one_rank(nn.Linear(3, 4)).weight
    full = torch.randn(shape)
    part = shard_like(full, own)
    assert torch.equal(part.full_tensor(), full)
    assert part.placements == own.placements if spread else part.placements[0].is_replicate()
    assert part.to_local().data_ptr() != full.data_ptr()
    assert shard_like(full, torch.zeros(2)) is full


def test_a_sharded_model_without_memory_is_loaded():
    state = {name: tensor.clone() for name, tensor in model_state(Net()).items()}
    model = on_meta()
    model.scratch = torch.zeros(2)
    target = on_one_rank(model)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    load_model_state(target, state)
    assert same(model_state(target), state)
    target(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model_state(target)["head.weight"], state["head.weight"])
    assert torch.equal(model_state(target)["body.0.weight"], state["body.0.weight"])


@pytest.mark.filterwarnings("ignore:FSDP is switching|.*NO_SHARD:Warning")
def test_the_first_fsdp_is_refused_with_what_to_use():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0] = FullyShardedDataParallel(model[0], device_id=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"^0 is a FullyShardedDataParallel, .*fully_shard$"):
        model_state(model)


UNFIT = {
    "meta": (torch.empty(2, 2, device="meta"), "weight is on the meta device in the file"),
    "sparse": (torch.eye(2).to_sparse(), "weight sparse_coo for strided"),
    "int8": (torch.ones(2, 2, dtype=torch.int8), "weight int8 for float16"),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), "weight complex64 for float16"),
    "too large": (torch.full((2, 2), -1e6), "weight float32 for float16, which cannot hold all"),
}


@pytest.mark.parametrize(("value", "said"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_become_the_models_tensor_is_found_before_anything_is_touched(value, said):
    model = nn.Linear(2, 2).half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=f"these cannot be taken over: {said}"):
        load_model_state(model, {"bias": torch.zeros(2), "weight": value}, cast=True)
    assert same(dict(model.state_dict()), before)
    report = load_model_state(model, {"bias": torch.zeros(2), "weight": value}, strict=False, cast=True)
    assert report.loaded == ("bias",)
    assert not report.is_complete
    assert "1 that cannot be taken over: weight " in str(report)
    assert torch.equal(model.weight, before["weight"])


def test_infinity_and_the_largest_number_may_be_converted():
    model = nn.Linear(2, 1, bias=False).half()
    load_model_state(model, {"weight": torch.tensor([[float("inf"), 65519.0]])}, cast=True)
    assert model.weight.tolist() == [[float("inf"), 65504.0]]
    load_model_state(model, {"weight": torch.tensor([[float("nan"), 1.0]])}, cast=True)
    assert model.weight[0, 1] == 1


def test_one_tensor_takes_no_two_values():
    model, one = Net(), torch.ones(3, 3)
    state = {**model_state(Net()), "module.weight": one, "head.weight": one.clone()}
    assert load_model_state(model, state).is_complete
    before = model.head.weight.detach().clone()
    state["head.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        CheckpointMismatchError, match=r"module\.weight and head\.weight are one tensor in the model, and differ in the file"
    ):
        load_model_state(model, state)
    assert not {"module.weight", "head.weight"} & set(load_model_state(model, state, strict=False).loaded)
    assert torch.equal(model.head.weight, before)


class Particular(nn.Module):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        raise KeyError(f"vocabulary of {state}")


def test_a_module_that_raises_is_an_error_that_says_what_may_have_happened():
    model = nn.Sequential(nn.Linear(2, 2), Particular())
    with pytest.raises(CheckpointMismatchError, match=r"a Sequential did not take its state \(KeyError: .*may be loaded in part"):
        load_model_state(model, model_state(model))
