"""DeepSpeed: the wrapper that its JSON chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.doctor.model import TinyModel, loss_of
from amsf_dist.doctor.reference import Compute
from amsf_dist.doctor.trial import scaled
from amsf_dist.doctor.wrapped import (
    Factory,
    OtherOptimizer,
    call,
    check_named,
    insists,
    whole_weights,
)
from amsf_dist.optimizer import AMSF

__all__ = ["UnderDeepSpeed", "compute_of", "details_of"]


class UnderDeepSpeed:
    """See `amsf_dist.doctor.wrapped.Wrapped`."""

    def __init__(
        self, config: Mapping[str, Any], factory: Factory, seed: int, device: torch.device
    ) -> None:
        """Build the tiny model and hand it to `deepspeed.initialize`.

        Args:
            config: DeepSpeed's JSON.
            factory: of the optimizer. AMSF is built by its name, if the JSON has one; anything
                else is handed over as a callable.
            seed: of the weights.
            device: of this process.
        """
        import deepspeed

        trial = scaled(config, dist.get_world_size())
        self.options, self.notes = trial.options, trial.notes
        model = TinyModel(seed).to(device)
        params = [param for param in model.parameters() if param.requires_grad]
        kwargs: dict[str, Any] = {"model_parameters": params}
        if factory is AMSF:
            check_named(trial.named)
        if factory is not AMSF or trial.named is None:
            trial.config.pop("optimizer", None)
        self.expected: Any = AMSF
        if factory is not AMSF:
            trial.config["zero_allow_untested_optimizer"] = True
            trial.config.setdefault("zero_force_ds_cpu_optimizer", False)
            kwargs["optimizer"] = self._made(factory)
        elif trial.named is None:
            kwargs["optimizer"] = self.expected = AMSF(model, **self.options)
        risky = "optimizer" in kwargs and insists(trial.config)
        try:
            self._engine = deepspeed.initialize(model=model, config=trial.config, **kwargs)[0]
        except RuntimeError as error:
            raise (OtherOptimizer(str(error)) if risky else error) from None
        self.optimizer = self._engine.basic_optimizer
        self.name, self.details = details_of(self._engine)
        self.clip = float(self._engine.gradient_clipping())
        self.micro_batches = self._engine.gradient_accumulation_steps()

    def _made(self, factory: Factory) -> Callable[[Any], torch.optim.Optimizer]:
        def make(params: Any) -> torch.optim.Optimizer:
            self.expected = factory(params, **self.options)
            return self.expected  # type: ignore[no-any-return]

        return make

    @property
    def compute(self) -> Compute:
        """As the engine says."""
        return compute_of(self._engine)

    def step(self, parts: Sequence[Tensor]) -> bool:
        """`engine.backward` and `engine.step` for every micro-batch."""
        for tokens in parts:
            self._engine.backward(loss_of(self._engine, tokens))
            self._engine.step()
        return bool(self._engine.was_step_applied())

    def weights(self) -> dict[str, Tensor]:
        """Gathered under ZeRO-3."""
        return whole_weights(self._engine.module)

    def eval(self) -> None:
        """`engine.optimizer.eval()`, or the basic optimizer's."""
        call(self._switch(), "eval")

    def train(self) -> None:
        """`engine.optimizer.train()`, or the basic optimizer's."""
        call(self._switch(), "train")

    def _switch(self) -> Any:
        wrapper = self._engine.optimizer
        return wrapper if hasattr(wrapper, "eval") else self.optimizer

    def save(self, folder: Path) -> None:
        """`engine.save_checkpoint`."""
        self._engine.save_checkpoint(str(folder))

    def load(self, folder: Path) -> None:
        """`engine.load_checkpoint`.

        Raises:
            RuntimeError: DeepSpeed found nothing, which it does not raise for.
        """
        path, _ = self._engine.load_checkpoint(str(folder))
        if path is None:
            raise RuntimeError("engine.load_checkpoint found nothing in what save_checkpoint wrote")

    def close(self) -> None:
        """`engine.destroy`."""
        self._engine.destroy()


def compute_of(engine: Any) -> Compute:
    """How an engine runs forward and backward."""
    if engine.fp16_enabled():
        return Compute(torch.float16, cast=True, loss_scale=float(engine.optimizer.loss_scale))
    if engine.bfloat16_enabled():
        return Compute(torch.bfloat16, cast=True)
    if engine.torch_autocast_enabled():
        return Compute(engine.torch_autocast_dtype(), autocast=True)
    return Compute()


def details_of(engine: Any) -> tuple[str, str]:
    """Class of an engine's wrapper, and what decides which code runs."""
    wrapper = engine.optimizer
    words = [f"ZeRO-{engine.zero_optimization_stage()}", str(compute_of(engine))]
    if engine.zero_use_cpu_optimizer():
        words.append("optimizer offloaded")
    flats = getattr(wrapper, "fp32_partitioned_groups_flat", ())
    if len(flats) > 1:
        words.append(f"{len(flats)} sub-groups")
    if engine.gradient_accumulation_steps() > 1:
        words.append(f"{engine.gradient_accumulation_steps()} micro-batches")
    if engine.gradient_clipping():
        words.append(f"clipped at {engine.gradient_clipping():g}")
    if wrapper is engine.basic_optimizer:
        return "none", ", ".join(words)
    return type(wrapper).__name__, ", ".join(words)
