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
from hpcckpt.state.tracked import Stateful, Tracked, check_version

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
    with pytest.raises(UsageError, match=r"^thing: .* has no state_dict and load_state_dict"):
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
    "another optimizer": (other_parameters, r"^optimizer: the checkpoint has 2 parameter groups \(of 1, 1 parameters\), "),
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


def saved_from(**objects):
    tracked = Tracked()
    for name, value in objects.items():
        tracked.add(name, value)
    return through_a_file(tracked.state())


def names_in(state, key="optimizer_state_dict"):
    return [group.get("param_names") for group in state[key]["param_groups"]]


def test_optimizers_name_the_parameters_of_every_tracked_module():
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
    both = torch.optim.SGD([*critic.parameters(), *generator.parameters()])
    state = saved_from(both=both, critic=critic, model=generator)
    assert names_in(state, "both_state_dict") == [["critic.weight", "weight", "bias"]]


def test_a_parameter_in_several_modules_is_called_as_in_the_model_first():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters())
    assert names_in(saved_from(optimizer=optimizer, part=model[0], model=model)) == [["0.weight"]]
    assert names_in(saved_from(optimizer=optimizer, part=model[0], whole=model)) == [["part.weight"]]


def test_names_are_those_of_the_time_of_saving():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    tracked = Tracked()
    tracked.add("model", model)
    tracked.add("optimizer", torch.optim.SGD(model.parameters()))
    model[0] = torch.compile(model[0], backend="eager")
    assert names_in(tracked.state()) == [["0.weight"]]
    assert tracked.module_names() == {"model": ["0.weight"]}


def test_two_models_and_two_optimizers_each_take_their_own():
    def gan(seed, order):
        torch.manual_seed(seed)
        modules = {"generator": nn.Linear(2, 2), "critic": nn.DataParallel(nn.Linear(2, 2))}
        optimizers = {f"{name}_optimizer": torch.optim.Adam(list(module.parameters())[::order]) for name, module in modules.items()}
        for module in modules.values():
            module(torch.ones(1, 2)).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
        return modules | optimizers

    source, target = gan(0, 1), gan(1, -1)
    state = saved_from(**source)
    tracked = Tracked()
    for name, value in reversed(target.items()):
        tracked.add(name, value)
    tracked.load(state)
    found = through_a_file(tracked.state())
    for name in ("generator", "critic"):
        assert all(torch.equal(found[f"{name}_state_dict"][key], tensor) for key, tensor in state[f"{name}_state_dict"].items())
        own = target[f"{name}_optimizer"]
        for parameter, other in zip(target[name].parameters(), source[name].parameters(), strict=True):
            assert torch.equal(own.state[parameter]["exp_avg"], source[f"{name}_optimizer"].state[other]["exp_avg"])


def test_a_boundary_keeps_the_names():
    training = Training()
    tracked = training.tracked()
    boundary = tracked.small_state()
    training.optimizer.param_groups[0]["lr"] = 9.0
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    state = tracked.state(boundary)
    assert names_in(state) == [[name for name, _ in training.model.named_parameters()]]
    assert state["optimizer_state_dict"]["param_groups"][0]["lr"] != 9.0


def test_putting_back_changes_no_names():
    model = nn.Linear(2, 2)
    for parameters in (model.parameters(), model.named_parameters()):
        optimizer = torch.optim.AdamW(parameters)
        before = optimizer.param_groups[0].get("param_names")
        tracked = Tracked()
        tracked.add("optimizer", optimizer)
        small = tracked.small_state()
        small["optimizer_state_dict"]["param_groups"][0]["param_names"] = ["other", "names"]
        tracked.put_back(small)
        assert optimizer.param_groups[0].get("param_names") == before


class Keeping(Counting):
    """Keeps what it is given."""

    def load_state_dict(self, state):
        self.count = state["count"]


def test_nothing_shares_memory_with_what_was_loaded():
    training, keeping = Training("Adam-tensor-lr"), Keeping({"deep": [torch.ones(2)]})
    training.train(2)
    tracked = training.tracked()
    tracked.add("keeping", keeping)
    content = through_a_file(tracked.state())
    kept = copy.deepcopy(content)
    tracked.load(content)
    keeping.count["deep"][0].add_(1)
    training.train(2)
    assert repr(content) == repr(kept)
    assert torch.equal(content["keeping_state_dict"]["count"]["deep"][0], torch.ones(2))


def test_modules_are_loaded_first_so_that_an_optimizer_finds_its_parameters_on_their_devices():
    def made(device):
        model = nn.Linear(2, 2, device=device)
        tracked, optimizer = Tracked(), torch.optim.SGD(model.parameters(), momentum=0.5)
        tracked.add("optimizer", optimizer)
        tracked.add("model", model)
        return tracked, model, optimizer

    source, model, optimizer = made("cpu")
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    target, loaded, restored = made("meta")
    target.load(through_a_file(source.state()))
    assert torch.equal(restored.state[loaded.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])
    assert torch.equal(loaded.weight, model.weight)


def test_a_module_without_memory_can_be_tracked_but_not_saved():
    tracked = Tracked()
    tracked.add("model", nn.Linear(2, 2, device="meta"))
    with pytest.raises(CheckpointSaveError, match=r"^model\.weight is on the meta device, which holds no values"):
        tracked.state()


class Refusing(Counting):
    def state_dict(self):
        if self.count:
            raise ValueError("not consolidated")
        return {}


def test_an_object_that_does_not_give_its_state_is_named_with_its_reason():
    with pytest.raises(UsageError, match=r"^odd: a Refusing did not give its state \(ValueError: not consolidated\); its state_dict"):
        Tracked().add("odd", Refusing(1))
    tracked, odd = Tracked(), Refusing()
    tracked.add("odd", odd)
    odd.count = 1
    for read in (tracked.state, tracked.small_state):
        with pytest.raises(CheckpointSaveError, match=r"^odd: a Refusing did not give its state \(ValueError: not consolidated\)"):
            read()


def test_a_module_that_has_seen_no_data_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"^model: weight has no shape .* run one batch through the model"):
        Tracked().add("model", nn.LazyLinear(2))


def test_other_ranks_read_no_plain_objects():
    tracked, odd = Tracked(), Refusing()
    tracked.add("odd", odd)
    tracked.add("model", nn.Linear(1, 1))
    odd.count = 1
    assert not tracked.has_sharded()
    assert tracked.state(is_main=False) == {}


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def two_modules():
    tracked, model, teacher = Tracked(), nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 3))
    tracked.add("model", model)
    tracked.add("teacher", teacher)
    tracked.add("optimizer", torch.optim.SGD(model.parameters()))
    return tracked, model, teacher


def test_weights_from_elsewhere_are_loaded_module_by_module_and_converted():
    tracked, model, teacher = two_modules()
    states = {"model": weights(nn.Linear(2, 2).double()), "teacher": weights(nn.Linear(2, 3))}
    assert tracked.load_weights(states, strict=True) == (
        "model: 2 loaded; 2 of another dtype: weight float64 for float32, bias float64 for float32",
    )
    assert torch.equal(model.weight, states["model"]["weight"].float())
    assert torch.equal(teacher.module.weight, states["teacher"]["weight"])


def test_weights_that_fit_in_part_are_noted_where_that_is_allowed():
    tracked, model, teacher = two_modules()
    before, given = weights(teacher), weights(nn.Linear(2, 2))
    states = {"model": {"weight": given["weight"], "head": given["bias"]}, "other": {}}
    with pytest.raises(CheckpointMismatchError, match="no weights for 'teacher'; there are those of model, other"):
        tracked.load_weights(states, strict=True)
    with pytest.raises(
        CheckpointMismatchError, match=r"^model: the checkpoint does not fit the model: it lacks bias; the model has no head"
    ):
        tracked.load_weights(states | {"teacher": weights(teacher.module)}, strict=True)
    assert tracked.load_weights(states, strict=False) == (
        "teacher: nothing to load, it keeps its own weights; there is model, other",
        "model: 1 loaded; 1 missing: bias; 1 unexpected: head",
        "other: is no tracked module, its weights are left out",
    )
    assert torch.equal(model.weight, given["weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(teacher).items())


def test_weights_of_which_nothing_fits_are_refused():
    tracked, *_ = two_modules()
    with pytest.raises(CheckpointMismatchError, match=r"not one tensor of the tracked modules is there: .*1 unexpected: other"):
        tracked.load_weights({"model": {"other": torch.ones(1)}}, strict=False)


def with_scheduler(groups, lr_of=lambda _: 0.1):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD([{"params": model[index].parameters(), "lr": lr_of(index)} for index in groups], momentum=0.9)
    tracked = Tracked()
    for name, value in (("model", model), ("optimizer", optimizer), ("scheduler", lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch))):
        tracked.add(name, value)
    return model, optimizer, tracked


def test_a_scheduler_does_not_give_one_groups_rates_to_another():
    rates = {0: 1.0, 1: 0.01}.get
    state = through_a_file(with_scheduler([0, 1], rates)[2].state())
    model, optimizer, tracked = with_scheduler([1, 0], rates)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(CheckpointMismatchError, match=r"^optimizer: groups of parameters come in another order .*\(scheduler\)"):
        tracked.load(state)
    assert repr([model.state_dict(), optimizer.state_dict()]) == repr(before)
    alone = Tracked()
    alone.add("model", model)
    alone.add("optimizer", optimizer)
    alone.load(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.0]


def test_a_scheduler_does_not_lose_count_of_groups_that_were_split():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters())
    state = saved_from(model=model, optimizer=optimizer, scheduler=lr.ReduceLROnPlateau(optimizer))
    with pytest.raises(CheckpointMismatchError, match="another order"):
        with_scheduler([0, 1])[2].load({**state, "scheduler_state_dict": {}})


def test_an_optimizer_that_does_not_fit_leaves_the_model_as_it_was():
    model, state = nn.Linear(2, 2), saved_from(model=(source := nn.Linear(2, 2)), optimizer=torch.optim.SGD(source.parameters()))
    tracked, before = Tracked(), model.weight.detach().clone()
    tracked.add("model", model)
    tracked.add("optimizer", torch.optim.SGD([model.weight]))
    with pytest.raises(CheckpointMismatchError, match="optimizer: the checkpoint does not fit the optimizer"):
        tracked.load(state)
    assert torch.equal(model.weight, before)


def test_a_small_view_does_not_take_its_whole_storage_along():
    large, model = torch.randn(1_000_000), nn.Module()
    model.register_buffer("first", large[:10])
    model.register_buffer("again", model.first)
    state = saved_from(model=model)["model_state_dict"]
    assert torch.equal(state["first"], large[:10])
    assert state["first"].untyped_storage().nbytes() == 40
    assert state["first"].data_ptr() == state["again"].data_ptr()


def test_a_file_of_a_later_format_is_refused(tmp_path):
    check_version({}, tmp_path)
    check_version({"format_version": 1}, tmp_path)
    for version in (2, "1", None):
        with pytest.raises(CheckpointMismatchError, match=r"was written in format .* upgrade hpcckpt"):
            check_version({"format_version": version}, tmp_path)


def test_its_size_is_that_of_what_modules_and_optimizers_hold():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.Adam(model.parameters())
    tracked = Tracked()
    tracked.add("model", model)
    tracked.add("optimizer", optimizer)
    parameters = 4 * (3 * 5 + 5 + 5 + 5)
    buffers = 4 * (5 + 5) + 8
    assert tracked.size_bytes() == parameters + buffers
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert tracked.size_bytes() == parameters + buffers + 2 * parameters + 4 * 4, "two moments, and four counts of steps"
    assert tracked.optimizers() == [optimizer]
