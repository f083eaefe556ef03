"""What of a model decides its memory: its weights, who uses them, and which are gathered together.

Only shapes are read, so the model may be on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Structure", "Weight", "read_structure"]


@dataclass(frozen=True)
class Weight:
    """One parameter; tied ones are one.

    Attributes:
        name: the first of its names.
        shape: of the whole parameter.
        looked_up: it is the table of an embedding, whose gradient is the last to be ready.
        uses: modules that hold it.
    """

    name: str
    shape: tuple[int, ...]
    looked_up: bool
    uses: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of dim 0, along which FSDP2 cuts."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Structure:
    """The weights of a model in the order of its modules, which is taken for the order of use.

    Attributes:
        model: the module.
        weights: all of them.
        calls: those that a module holds itself, module by module.
        units: those that are gathered together, unit by unit; they are sharded before the root.
        root: what is in no unit.
    """

    model: nn.Module
    weights: tuple[Weight, ...]
    calls: tuple[tuple[Weight, ...], ...]
    units: tuple[tuple[Weight, ...], ...]
    root: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """Numbers in the model."""
        return sum(weight.numel for weight in self.weights)


def read_structure(model: nn.Module, units: Iterable[nn.Module] = ()) -> Structure:
    """Read a model.

    Args:
        model: on any device, not wrapped.
        units: modules that are sharded on their own under FSDP, inner ones before outer ones
            where they nest, as `fully_shard` wants them.
    """
    holders: dict[Tensor, list[nn.Module]] = {}
    names: dict[Tensor, str] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(path, recurse=False):
            holders.setdefault(param, []).append(module)
            names.setdefault(param, name)
    weights = {
        param: Weight(
            names[param],
            tuple(param.shape),
            any(isinstance(module, nn.Embedding) for module in modules),
            len(modules),
        )
        for param, modules in holders.items()
    }
    calls = [tuple(weights[p] for p in m.parameters(recurse=False)) for m in model.modules()]
    taken: set[Tensor] = set()
    by_unit: dict[nn.Module, tuple[Weight, ...]] = {}
    for unit in units:
        inside = [param for param in unit.parameters() if param not in taken]
        taken.update(inside)
        by_unit[unit] = tuple(weights[param] for param in inside)
    return Structure(
        model,
        tuple(weights.values()),
        tuple(call for call in calls if call),
        tuple(by_unit[module] for module in model.modules() if by_unit.get(module)),
        tuple(weight for param, weight in weights.items() if param not in taken),
    )
