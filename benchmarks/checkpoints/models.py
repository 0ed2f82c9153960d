"""Live models with optimizers, of the shapes of `states`; their numbers are random, and the same in every process."""

from collections.abc import Iterable, Mapping

import torch
import xxhash

from benchmarks.checkpoints.states import Shapes, State, flat, gpt2, resnet50, tensors_of, tiny

# Parameters, and whether the optimizer is Adam's kind.
MODELS = {
    "gpt2": (gpt2, True),
    "resnet50": (resnet50, False),
    "tiny": (tiny, True),
}


class Layers(torch.nn.Module):
    """Parameters of given shapes."""

    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.full(shape, 0.5) for shape in shapes)  # in memory that is there

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return something that every parameter has a part in."""
        return torch.stack([value * parameter.sum() for parameter in self.layers]).sum()


def shapes_of(name: str) -> Shapes:
    """Return the shapes of a model's parameters."""
    return list(MODELS[name][0]())


def fresh(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, which has made no step."""
    model = Layers(shapes_of(name))
    if MODELS[name][1]:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer behind a step."""
    model, optimizer = fresh(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return what is saved of them; its tensors are the live ones."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def digests(state: State) -> dict[str, str]:
    """Return what tells the bits of each tensor from any others."""
    return {name: xxhash.xxh3_128_hexdigest(_bytes(tensor)) for name, tensor in flat(state).items()}


def update(state: Mapping[str, object], by: float) -> None:
    """Change every tensor in place, as an optimizer's step does."""
    with torch.no_grad():
        for tensor in tensors_of(state):
            tensor.add_(by)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
