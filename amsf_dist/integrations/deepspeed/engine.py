"""A DeepSpeed engine as the owner of the tensors that AMSF moves."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amsf_dist.architecture import read_architecture
from amsf_dist.blocks import canonical_name
from amsf_dist.groups import Seat, cut_lines
from amsf_dist.integrations.deepspeed.loss_scale import scale_loss_in_backward
from amsf_dist.integrations.deepspeed.pieces import describe
from amsf_dist.integrations.deepspeed.publish import publish
from amsf_dist.optimizer import AMSF
from amsf_dist.shards import Flats
from amsf_dist.shards.zero import Visible, visible_tensors

__all__ = ["Engine"]

# What users ask of `engine.optimizer`, which is DeepSpeed's wrapper and passes nothing on.
_PASSED_ON = (
    "eval",
    "train",
    "averaged_parameters",
    "averaged_state_dict",
    "explain",
    "memory",
)


class Engine:
    """The owner of fp32 partitions at ZeRO-1, 2 and 3, of fp32 copies, or of the parameters."""

    def __init__(self, engine: Any) -> None:
        """Look at what the engine has built; see `bind`.

        Args:
            engine: a `DeepSpeedEngine` whose basic optimizer is an AMSF.
        """
        self._engine = weakref.ref(engine)
        optimizer: AMSF = engine.basic_optimizer
        self._groups = list(optimizer.param_groups)
        visible = visible_tensors(engine.optimizer, engine.param_names, engine.device.type)
        self._visible = [tensor for unit in visible for tensor in unit]
        self._flats: Flats = {seen.tensor: seen.slices for seen in self._visible if seen.slices}
        facts = read_architecture(engine.module)
        self._units = [[self._seat(seen, facts) for seen in unit] for unit in visible]
        _clear_padding(self._visible)

    @staticmethod
    def bind(engine: Any) -> None:
        """Let the engine's AMSF train the tensors of the engine."""
        optimizer: AMSF = engine.basic_optimizer
        optimizer.bind(Engine(engine))
        scale_loss_in_backward(engine)
        if engine.optimizer is not optimizer:
            for name in _PASSED_ON:
                setattr(engine.optimizer, name, getattr(optimizer, name))

    def _seat(self, seen: Visible, facts: Mapping[str, Any]) -> Seat:
        group = self._groups[seen.group]
        named = {**group, "params": [seen.tensor], "param_names": [seen.name]}
        (parts,) = cut_lines(named, facts, self._flats)
        return Seat(group, seen.tensor, canonical_name(seen.name), parts)

    @property
    def engine(self) -> Any:
        """The engine.

        Raises:
            RuntimeError: it is gone.
        """
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the DeepSpeed engine of this optimizer has been deleted")
        return engine

    @property
    def units(self) -> Sequence[Sequence[Seat]]:
        """One per group (ZeRO-1, 2), per sub-group (ZeRO-3), or one of everything."""
        return self._units

    @property
    def flats(self) -> Flats:
        """The slices of parameters in every partition."""
        return self._flats

    def before_step(self) -> None:
        """DeepSpeed has seen to everything."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """ZeRO-3 leaves the groups empty between steps: fill them, as it does for a step."""
        before = [group["params"] for group in self._groups]
        tensors = defaultdict(list)
        for seen in self._visible:
            tensors[seen.group].append(seen.tensor)
        for number, group in enumerate(self._groups):
            group["params"] = tensors[number]
        try:
            yield
        finally:
            for group, params in zip(self._groups, before, strict=True):
                group["params"] = params

    def publish(self) -> None:
        """Masters -> the weights that forward uses; every rank must call it."""
        publish(self.engine.optimizer)

    @torch.no_grad()
    def whole(
        self, tensors: Mapping[int, Tensor], model: nn.Module, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The model's state dict on the CPU, trained parameters read from `tensors`."""
        numbers: dict[str, Tensor] = {}
        for seen in self._visible:
            values = tensors[id(seen.tensor)]
            if not seen.slices:
                numbers[canonical_name(seen.name)] = values.cpu()
            for part in seen.slices:
                device = torch.device(part.axis.device_type)
                gathered = values.new_zeros(part.shape, device=device)
                here = slice(part.offset, part.offset + part.stop - part.start)
                gathered.view(-1)[part.start : part.stop].copy_(values[here])
                dist.all_reduce(gathered, group=part.axis.group)
                numbers[part.name] = gathered.cpu()
        module = self.engine.module
        shared = {
            name: canonical_name(self.engine.param_names[param])
            for name, param in module.named_parameters(remove_duplicate=False)
        }
        found = {}
        for name, value in _state_dict(module).items():
            trained = numbers.get(shared.get(name, name))
            found[canonical_name(name)] = (
                value if trained is None else trained.to(dtype or value.dtype)
            )
        return found

    def extras(self) -> dict[str, Any]:
        """Which parts of which parameters the state lies over."""
        with self.shown():
            order = [id(param) for group in self._groups for param in group["params"]]
        holdings = {id(h.param): h for h in self.engine.basic_optimizer.holdings}
        return {"amsf_pieces": [describe(holdings[key], self._flats) for key in order]}


def _state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict; of partitioned parameters those that are not trained gathered."""
    import deepspeed

    found = dict(module.state_dict())
    for name, param in module.named_parameters(remove_duplicate=False):
        if not hasattr(param, "ds_id"):
            continue
        if param.requires_grad:
            found[name] = torch.empty(0, dtype=param.dtype)
            continue
        with deepspeed.zero.GatheredParameters(param):
            found[name] = param.detach().cpu().clone()
    return found


@torch.no_grad()
def _clear_padding(visible: Sequence[Visible]) -> None:
    """ZeRO-3 leaves what it pads partitions with uninitialised, and checkpoints carry it on."""
    for seen in visible:
        if not seen.slices:
            continue
        end = 0
        for part in seen.slices:
            seen.tensor[end : part.offset].zero_()
            end = part.offset + part.stop - part.start if part.stop > part.start else end
        seen.tensor[end:].zero_()
