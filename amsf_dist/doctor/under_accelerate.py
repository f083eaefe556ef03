"""accelerate: whatever `Accelerator().prepare` makes of what `accelerate launch` exports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amsf_dist.doctor.model import TinyModel, loss_of
from amsf_dist.doctor.reference import Compute
from amsf_dist.doctor.setup import Setup, needed
from amsf_dist.doctor.trial import options_for, scaled
from amsf_dist.doctor.under_deepspeed import compute_of, details_of
from amsf_dist.doctor.wrapped import (
    Factory,
    OtherOptimizer,
    check_named,
    insists,
    whole_weights,
)
from amsf_dist.optimizer import AMSF

__all__ = ["UnderAccelerate", "accelerator_for"]


# Options for which accelerate, or torch, looks for a GPU.
_NOT_ON_A_CPU = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD")
_NOT_ON_A_CPU_IN_FSDP1 = ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING")


class UnderAccelerate:
    """See `amsf_dist.doctor.wrapped.Wrapped`."""

    def __init__(self, setup: Setup, factory: Factory, seed: int, device: torch.device) -> None:
        """Build the tiny model and prepare it; the environment is the setup's.

        Args:
            setup: of accelerate.
            factory: of the optimizer. AMSF is built by its name, if the DeepSpeed JSON has one.
            seed: of the weights.
            device: of this process.
        """
        self._accelerator = accelerator = accelerator_for(setup, device)
        self._shards = setup.shards
        fsdp1 = setup.shards and not accelerator.is_fsdp2
        model = TinyModel(seed, setup.freezes)
        self.options: dict[str, Any] = options_for({})
        self.notes: tuple[str, ...] = ()
        self.expected: Any = AMSF
        if setup.speeds:
            self._model, self._optimizer = self._with_deepspeed(model, factory)
        elif fsdp1:  # as its documentation asks: the optimizer on the wrapped model
            self._model = accelerator.prepare(model)
            self.expected = factory(self._model, **self.options)
            self._optimizer = accelerator.prepare(self.expected)
        else:
            self.expected = factory(model, **self.options)
            self._model, self._optimizer = accelerator.prepare(model, self.expected)
        if setup.shards and device.type == "cpu":
            self.notes = (
                "accelerate uses FSDP on accelerators only: it is told that the CPU is one, and "
                "nothing is offloaded",
            )
        self._engine = self._model if setup.speeds else None
        self.micro_batches = accelerator.gradient_accumulation_steps
        if self._engine is not None:
            self.optimizer = self._engine.basic_optimizer
            self.name, self.details = details_of(self._engine)
            self.clip = float(self._engine.gradient_clipping())
        else:
            self.optimizer = self._optimizer.optimizer
            self.name, self.details = _name_of(self._model), str(self.compute)
            self.clip = 0.0

    def _with_deepspeed(self, model: TinyModel, factory: Factory) -> Any:
        """Fit the JSON, and prepare the optimizer that it names, or one that is handed over."""
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        trial = scaled(config, self._accelerator.num_processes)
        self.options, self.notes = trial.options, trial.notes
        config.clear()
        config.update(trial.config)
        if trial.named is not None and factory is AMSF:
            check_named(trial.named)
            params = [param for param in model.parameters() if param.requires_grad]
            dummy = needed("accelerate.utils").DummyOptim
            return self._accelerator.prepare(model, dummy(params, lr=self.options["lr"]))
        config.pop("optimizer", None)
        self.expected = factory(model, **self.options)
        try:
            return self._accelerator.prepare(model, self.expected)
        except RuntimeError as error:
            raise (OtherOptimizer(str(error)) if insists(config) else error) from None

    @property
    def compute(self) -> Compute:
        """As the engine says, or accelerate's mixed precision."""
        if self._engine is not None:
            return compute_of(self._engine)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self._accelerator.mixed_precision)
        if not self._accelerator.native_amp or dtype is None:
            return Compute()
        scaler = self._accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # FSDP casts the weights; FSDP1 runs under autocast as well, FSDP2 does not
        shards, autocast = self._shards, not self._accelerator.is_fsdp2
        return Compute(dtype, cast=shards, autocast=autocast, loss_scale=scale)

    def step(self, parts: Sequence[Tensor]) -> bool:
        """Backward and step inside `accumulate`."""
        for tokens in parts:
            with self._accelerator.accumulate(self._model):
                self._accelerator.backward(loss_of(self._model, tokens))
                self._optimizer.step()
                self._optimizer.zero_grad()
        return not self._accelerator.optimizer_step_was_skipped

    def weights(self) -> dict[str, Tensor]:
        """Gathered wherever they are sharded."""
        return whole_weights(self._model)

    def eval(self) -> None:
        """`optimizer.eval()` of what `prepare` gave back."""
        self._optimizer.eval()

    def train(self) -> None:
        """`optimizer.train()` of what `prepare` gave back."""
        self._optimizer.train()

    def save(self, folder: Path) -> None:
        """`accelerator.save_state`."""
        self._accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """`accelerator.load_state`."""
        self._accelerator.load_state(str(folder))

    def close(self) -> None:
        """Free the models, and forget what the environment said."""
        self._accelerator.free_memory()
        _forget()


def _forget() -> None:
    """Let the next Accelerator read the environment."""
    state = needed("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def accelerator_for(setup: Setup, device: torch.device) -> Any:
    """An Accelerator as a launched script would build it; inside `environment`.

    Args:
        setup: of accelerate.
        device: of this process. On a CPU accelerate is told that FSDP may use it.
    """
    accelerate, utils = needed("accelerate"), needed("accelerate.utils")
    _forget()  # a wrapper that could not be built was not closed
    if device.type != "cpu":
        return accelerate.Accelerator()
    if setup.speeds:  # without a backend it would take itself for the only process
        gloo = utils.InitProcessGroupKwargs(backend="gloo")
        return accelerate.Accelerator(kwargs_handlers=[gloo])
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:0, which FSDP1 takes for another one
    state = accelerate.PartialState(cpu=True)
    if setup.shards:  # on a CPU accelerate leaves FSDP out without a word
        state.distributed_type = utils.DistributedType.MULTI_GPU
        os.environ.update(dict.fromkeys(_NOT_ON_A_CPU, "false"))
        if setup.environment.get("FSDP_VERSION") == "1":
            os.environ.update(dict.fromkeys(_NOT_ON_A_CPU_IN_FSDP1, "false"))
    return accelerate.Accelerator(cpu=not setup.shards)


def _name_of(model: nn.Module) -> str:
    """The class that wraps, or what `fully_shard` has made of the model's own."""
    if type(model) is TinyModel:
        return "none"
    name = type(model).__name__
    return f"fully_shard ({name})" if name.startswith("FSDP") else name
