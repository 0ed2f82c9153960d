"""Names in files of others are matched to the model's: wrappers, prefixes, and nothing guessed where two readings fit."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.foreign import WRAPPER_PARTS, common_prefixes, fit_names, model_state_in

W = torch.ones(2)
MODEL = ["body.0.weight", "body.0.bias", "head.weight", "scale"]


def behind(*parts, names=MODEL):
    return {name: ".".join([*parts, name]) for name in names}


@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": {"w": W}, "state_dict": {"x": W}},
        {"state_dict": {"w": W}, "hyper_parameters": {"lr": 0.1}},
        {"model": {"w": W}, "epoch": 3},
        {"w": W},
        {"model": {"name": "resnet"}, "state_dict": {"w": W}},
    ],
)
def test_the_models_state_is_found(content):
    assert list(model_state_in(content)) == ["w"]


def test_a_state_under_its_own_key_may_hold_what_modules_add():
    assert dict(model_state_in({"model_state_dict": {"w": W, "a._extra_state": {"calls": 3}}}))["a._extra_state"] == {"calls": 3}
    assert list(model_state_in({"w": W, "a._extra_state": {"calls": 3}, "_extra_state": 1})) == ["w", "a._extra_state", "_extra_state"]
    assert model_state_in({}) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "weights": {"w": W}}, "its keys are epoch, weights"),
        ({"model": {"name": "resnet"}}, "its keys are model"),
        ({f"k{number}": number for number in range(20)}, "k7 and 12 more"),
        ([W], "it holds a list, not a model's state"),
        (W, "it holds a Tensor"),
        (None, "it holds a NoneType"),
    ],
)
def test_where_there_is_none_the_keys_are_listed(content, said):
    with pytest.raises(CheckpointMismatchError) as caught:
        model_state_in(content)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        *[(part,) for part in sorted(WRAPPER_PARTS)],
        ("module", "_orig_mod"),
        ("_orig_mod", "module"),
        ("model",),
        ("model", "_orig_mod"),
        ("module", "model"),
        ("net", "backbone"),
    ],
    ids=".".join,
)
def test_whatever_stands_before_all_names_is_left_out(parts):
    assert fit_names(behind(*parts).values(), MODEL) == behind(*parts)


def test_wrappers_within_are_left_out():
    saved = {"body.0.weight": "body.0._orig_mod.weight", "body.0.bias": "body.0._orig_mod.bias", "scale": "scale"}
    assert fit_names(saved.values(), MODEL) == saved
    fsdp = {name: f"_fsdp_wrapped_module.{name.replace('0.', '0._checkpoint_wrapped_module.')}" for name in MODEL}
    assert fit_names(fsdp.values(), MODEL) == fsdp


def test_a_submodule_that_is_really_called_module_keeps_its_name():
    model = ["w", "module.w", "module.module.w", "_orig_mod.w"]
    assert fit_names(model, model) == behind(names=model)
    # The wrapped model has names of the plain one, too: taken one by one, tensors would change places.
    assert fit_names(behind("module", names=model).values(), model) == behind("module", names=model)
    within = ["a.w", "a.module.w"]
    wrapped = {"a.w": "a.module.w", "a.module.w": "a.module.module.w"}
    assert fit_names(wrapped.values(), within) == wrapped
    assert fit_names(["module.w"], ["module.w", "w"]) == {"module.w": "module.w"}


def test_a_state_dict_put_together_by_hand_is_matched_name_by_name():
    saved = {"body.0.weight": "module.body.0.weight", "body.0.bias": "body.0.module.bias", "head.weight": "head.weight"}
    assert fit_names([*saved.values(), "other"], MODEL) == saved


@pytest.mark.parametrize(
    ("saved", "wanted", "fitting"),
    [
        (["module.w", "w"], ["w"], {"w": "w"}),
        (["module.w", "_orig_mod.w"], ["w"], {}),
        (["module.w", "_orig_mod.w", "w"], ["w"], {"w": "w"}),
        (["module.a.module.w", "module.a.x", "y"], ["module.a.w", "a.module.w", "y"], {"y": "y"}),
        # Its nearest name is another key's already.
        (["module.w", "module.module.w", "x"], ["w", "module.w", "x"], {"module.w": "module.w", "x": "x"}),
        (["modulew", "xmodule.w"], ["x.w"], {}),
    ],
)
def test_where_two_readings_fit_nothing_is_guessed(saved, wanted, fitting):
    assert fit_names(saved, wanted) == fitting


def test_the_prefix_with_most_names_is_found_beside_others():
    saved = [*behind("model").values(), "loss.scale", "metric.head.weight"]
    assert fit_names(saved, MODEL) == behind("model")
    assert common_prefixes(saved, MODEL) == ["model."]


def test_two_prefixes_with_equally_many_names_are_no_answer():
    saved = [*behind("model").values(), *behind("ema").values()]
    assert fit_names(saved, MODEL) == {}
    assert common_prefixes(saved, MODEL) == ["ema.", "model."]
    assert fit_names(saved, MODEL, "ema.") == fit_names(saved, MODEL, "ema") == behind("ema")
    assert fit_names(["a.w", "b.w"], ["a.w", "w"]) == {"a.w": "a.w"}


def test_a_prefix_may_be_the_models():
    wanted = ["bert.x.weight", "bert.y.weight", "classifier.weight"]
    fitting = {"bert.x.weight": "x.weight", "bert.y.weight": "y.weight"}
    assert fit_names(["x.weight", "y.weight"], wanted) == fitting
    assert fit_names(["module.x.weight", "module.y.weight"], wanted, "bert") == {k: f"module.{v}" for k, v in fitting.items()}
    # What is spelled alike is outside of the prefix, and may be something else.
    assert fit_names(["x.weight", "y.weight", "classifier.weight"], wanted) == fitting


def test_a_given_prefix_goes_before_names_as_they_are():
    assert fit_names(["w", "model.w"], ["w"]) == {"w": "w"}
    assert fit_names(["w", "model.w"], ["w"], "model.") == {"w": "model.w"}
    assert fit_names(behind("module", "model", "_orig_mod").values(), MODEL, "model.") == behind("module", "model", "_orig_mod")
    assert fit_names(behind("model").values(), MODEL, "") == {}
    assert fit_names(MODEL, MODEL, "model.") == {}


NAMES = st.lists(st.sampled_from(["module", "_orig_mod", "a", "b", "w"]), min_size=1, max_size=5).map(".".join)
SETS = st.lists(NAMES, unique=True, max_size=10)


@given(SETS, SETS, st.none() | NAMES)
def test_no_name_is_used_twice_and_none_is_invented(saved, wanted, prefix):
    fitting = fit_names(saved, wanted, prefix)
    assert fitting.keys() <= set(wanted)
    assert set(fitting.values()) <= set(saved)
    assert len(set(fitting.values())) == len(fitting)
    assert fit_names(saved, wanted, prefix) == fitting


@given(SETS)
def test_names_that_are_alike_fit_whatever_they_are(names):
    assert fit_names(names, names) == {name: name for name in names}


@given(SETS, st.lists(st.sampled_from(sorted(WRAPPER_PARTS)), max_size=3))
def test_any_model_fits_its_wrapped_self(names, wrappers):
    assert fit_names(behind(*wrappers, names=names).values(), names) == behind(*wrappers, names=names)


@given(SETS, SETS)
def test_only_wrappers_parts_or_one_prefix_differ(saved, wanted):
    plain = lambda name: [part for part in name.split(".")[:-1] if part not in WRAPPER_PARTS] + name.split(".")[-1:]  # noqa: E731
    leads = set()
    for mine, theirs in fit_names(saved, wanted).items():
        short, long = sorted((plain(mine), plain(theirs)), key=len)
        assert long[len(long) - len(short) :] == short
        leads.add((tuple(long[: len(long) - len(short)]), len(plain(mine)) > len(plain(theirs))))
    assert len({lead for lead in leads if lead[0]}) <= 1


@pytest.mark.parametrize("parts", [(), ("module",), ("model",), ("module", "model", "_orig_mod")], ids=".".join)
def test_ten_thousand_names_take_no_time(parts):
    names = [f"layers.{block}.attention.{which}.weight" for block in range(2500) for which in ("q", "k", "v", "out")]
    saved = behind(*parts, names=names)
    began = time.process_time()
    assert fit_names(saved.values(), names) == saved
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["module." * 100_000 + "w", "a." * 100_000, "." * 3000, "module." * 150, "", "."])
def test_absurd_names_do_no_harm(name):
    assert fit_names([name, "b"], [name, "b"]) == {name: name, "b": "b"}
    assert "b" in fit_names([name, "b"], ["b", "w"])
    fit_names(["b", "w"], [name])


def test_many_prefixes_that_all_find_the_same_cost_nothing():
    saved = [f"layer{number}.{name}" for number in range(5000) for name in ("weight", "bias")]
    began = time.process_time()
    assert fit_names(saved, ["weight", "bias"]) == {}
    assert time.process_time() - began < 5
