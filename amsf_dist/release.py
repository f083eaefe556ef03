"""Gradient release: the step of a module inside backward, as soon as its gradients are final.

Gradients then never exist all at once: a unit's are freed when it has moved. A unit is an FSDP
module, whose gradients are views of one buffer, or in a plain model the module that owns the
parameters. It is updated by the very call that `step()` makes for everything.

Only `register_post_accumulate_grad_hook` is used: it fires alike for plain tensors and, after the
reduction, for FSDP2's shards (pytorch#129450).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from amsf_dist.optimizer import AMSF

__all__ = ["GradientRelease", "enable_gradient_release"]


def enable_gradient_release(
    model: nn.Module,
    optimizer: AMSF,
    clip: str | None = None,
    max_norm: float | None = None,
    *,
    accumulation: str = "exact",
    defer: Iterable[nn.Module] = (),
) -> GradientRelease:
    """Move every module's weights inside backward, and free its gradients.

    The training loop stays as it is: `step()` finishes the step (what got no gradient, what was
    deferred), `zero_grad()` finds nothing left. While `optimizer.optimizer_accumulation` is True,
    `step()` and `zero_grad()` do nothing, and gradients are accumulated.

    Args:
        model: what `optimizer` trains: plain, or wrapped by `fully_shard` or tensor parallel.
        optimizer: its state stays as it is.
        clip: "block", "tensor" or "norm", see `AMSF`; None: as the optimizer was built. The norm of
            all gradients is not known inside backward: "norm" goes by that of earlier steps, or
            by what has been seen in this one if it is larger.
        max_norm: of `clip="norm"`.
        accumulation: what happens while `optimizer.optimizer_accumulation` is True. "exact":
            gradients add up in the parameters, and the last backward releases them. "state": every
            backward releases them into the optimizer's state, which needs no memory and is not
            quite the same (docs/release.md).
        defer: modules whose parameters get gradients in several backward passes of one step (a
            chunked loss); they move in `step()`.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        ValueError: it cannot be right (DDP, FSDP1, DeepSpeed, a GradScaler), or the model is not
            the optimizer's; the message has the way out.
    """
    if clip is not None or max_norm is not None:
        optimizer.set_clip(clip, max_norm)
    return GradientRelease(model, optimizer, accumulation, defer)


class GradientRelease:
    """Hooks on the parameters of a model; see `enable_gradient_release`.

    Attributes:
        largest: bytes of the gradients of the largest unit on this rank: what is there at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AMSF,
        accumulation: str = "exact",
        defer: Iterable[nn.Module] = (),
    ) -> None:
        """See `enable_gradient_release`."""
        if accumulation not in ("exact", "state"):
            raise ValueError(f"accumulation must be 'exact' or 'state', got {accumulation!r}")
        if optimizer.is_split:
            raise ValueError("gradient release is enabled already: remove() its handle first")
        if optimizer.is_owned:
            raise ValueError(
                "DeepSpeed keeps gradients in buffers of its own and steps when it has all of "
                "them: nothing would be freed. Use FSDP2 for gradient release, or ZeRO-2 and 3, "
                "which keep one part of the gradients on every rank"
            )
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        units = [[p for p in params if id(p) in trained] for params in _units(model)]
        if not any(units):
            raise ValueError(
                "none of the model's parameters is in the optimizer: pass the model it was built "
                "on, and build it after fully_shard"
            )
        _refuse_wrappers({id(param) for unit in units for param in unit})
        self._optimizer, self._proven = optimizer, False
        self.largest = max(sum(_bytes(param) for param in unit) for unit in units)
        optimizer.split([unit for unit in units if unit], accumulation == "state")
        later = {id(param) for module in defer for param in module.parameters()}
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for unit in units
            for param in unit
            if id(param) not in later
        ]

    def remove(self) -> None:
        """Take the hooks away: the next step is an ordinary one. Idempotent.

        Raises:
            RuntimeError: some modules have moved in this step and others have not.
        """
        if self._hooks:
            self._optimizer.split(None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _arrived(self, param: Tensor) -> None:
        """A parameter's gradient is there, reduced."""
        if not self._proven:  # what came between enabling and the first backward
            self._proven = True
            _refuse_wrappers({id(param)})
        self._optimizer.arrived(param)


def _units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters by the module whose gradients become final together, every one once."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    seen: set[int] = set()
    units: dict[str, list[nn.Parameter]] = {}
    owner: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent = owner.get(name.rpartition(".")[0], "")
        own = isinstance(module, FSDPModule) if sharded else True
        owner[name] = name if own else parent
        for param in module.parameters(recurse=False):
            if id(param) not in seen:  # tied weights belong to the first
                seen.add(id(param))
                units.setdefault(owner[name], []).append(param)
    return list(units.values())


def _bytes(param: nn.Parameter) -> int:
    here = param.detach()
    here = here.to_local() if isinstance(here, DTensor) else here
    return here.numel() * here.element_size()


def _refuse_wrappers(params: set[int]) -> None:
    """Look for what would give gradients that are not final, wherever it was made.

    Raises:
        ValueError: it is there.
    """
    for thing in gc.get_objects():
        try:
            kind = type(thing)
            scaler = issubclass(kind, torch.amp.GradScaler)
            wrapper = issubclass(kind, (DistributedDataParallel, FullyShardedDataParallel))
        except ReferenceError:  # a proxy whose object is gone
            continue
        if scaler and thing.is_enabled():
            raise ValueError(
                "gradient release moves weights before a GradScaler can unscale their gradients: "
                "train in bf16, which needs none, or take the ordinary step"
            )
        if wrapper and any(id(param) in params for param in thing.parameters()):
            way_out = (
                "use fully_shard on a mesh of (ranks, 1): the same data parallelism, and gradients "
                "that can be freed"
                if issubclass(kind, DistributedDataParallel)
                else "use FSDP2 (fully_shard)"
            )
            raise ValueError(
                f"gradient release does not work under {kind.__name__}: it shows gradients before "
                f"they are reduced, and keeps their memory; {way_out}, or take the ordinary step"
            )
