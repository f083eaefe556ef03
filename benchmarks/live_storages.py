"""Live memory counted by storages: what a process holds, and the most it held meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Sees every tensor that an operation gives back, and keeps a weak look at its storage.

    Enter it before anything is allocated. What C++ allocates through torch (gradients, buckets of
    DDP) is seen as well. The copies that gloo makes of what it sends are not: their storages come
    up as arguments first, and NCCL has none.

    Attributes:
        peak: bytes by storage when they were most, since `forget_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, StorageWeakRef] = {}
        self.peak: dict[int, int] = {}
        self._peak_total = -1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor does its work in operations on local tensors
        out = func(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        before = len(self._seen)
        for tensor in _tensors(out):
            if _key(tensor) not in given:
                self._note(tensor)
        # more is held only after an allocation, or where FSDP has let storages grow
        if len(self._seen) > before or func.namespace == "fsdp":
            self.look()
        return out

    def look(self) -> int:
        """Bytes that are alive now."""
        alive = self.alive()
        total = sum(alive.values())
        if total > self._peak_total:
            self.peak, self._peak_total = alive, total
        return total

    def alive(self) -> dict[int, int]:
        """Bytes by storage."""
        found: dict[int, int] = {}
        for key, weak in list(self._seen.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                del self._seen[key]
            elif storage.device.type != "meta":
                found[key] = storage.nbytes()
        return found

    def forget_peak(self) -> None:
        """Begin anew."""
        gc.collect()
        self._peak_total = -1
        self.look()

    @property
    def peak_bytes(self) -> int:
        """The most since `forget_peak`."""
        return self._peak_total

    def _note(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        weak = StorageWeakRef(storage)
        self._seen.setdefault(weak.cdata, weak)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _key(tensor: Tensor) -> int:
    return local(tensor).untyped_storage()._cdata


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = local(tensor).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
