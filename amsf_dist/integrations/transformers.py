"""Hugging Face Trainer: AMSF built from the model, and x in every evaluation and every save.

trainer = Trainer(
    model, args, train_dataset=...,
    optimizer_cls_and_kwargs=(AMSFFactory, {"lr": 4e-3, "warmup_steps": 500}),
    callbacks=[AveragedWeights()],
)
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from amsf_dist.integrations.accelerate import unwrapped
from amsf_dist.optimizer import AMSF
from amsf_dist.rules import RULES

__all__ = ["AMSFFactory", "AveragedWeights"]

logger = logging.getLogger(__name__)

_PROBES = 256  # steps at which a schedule is asked for its learning rate


class AMSFFactory:
    """What `Trainer(optimizer_cls_and_kwargs=(AMSFFactory, {...}))` builds AMSF with.

    A class of optimizers would be given parameters without names; a factory is given the model, so
    that blocks follow its modules (heads from `head_dim`, embeddings, fused projections).
    """

    def __init__(self, *groups: Any, **options: Any) -> None:
        """Take nothing: the Trainer calls the instance.

        Raises:
            TypeError: it was called as if it were a class of optimizers.
        """
        if groups or options:
            raise TypeError(
                "AMSFFactory was called with parameters: this version of transformers knows no "
                "optimizer factories. Give the Trainer the optimizer itself: "
                "optimizers=(AMSF(model, ...), None)"
            )

    def __call__(self, model: nn.Module, **options: Any) -> AMSF:
        """Build the optimizer; the Trainer calls it when the model is where it will be trained.

        Args:
            model: the Trainer's.
            **options: of AMSF.

        Raises:
            ValueError: no lr: the Trainer gives its own `learning_rate` to its own optimizers only,
                and AMSF's default would train in its place unnoticed.
        """
        if "lr" not in options:
            raise ValueError(
                "AMSF's lr is missing: the Trainer does not hand learning_rate on to a factory; "
                'say optimizer_cls_and_kwargs=(AMSFFactory, {"lr": args.learning_rate, ...})'
            )
        return AMSF(model, **options)


class AveragedWeights(TrainerCallback):  # type: ignore[misc]
    """Puts the average x into every evaluation and every save; training goes on from y.

    The Trainer itself puts y back, bit for bit, when its next training step begins. A checkpoint
    holds x as the model, and y beside it in the optimizer's file: `resume_from_checkpoint` goes on
    as if nothing had happened. After the last step the weights are x, for `save_model` and the hub.

    Give it after callbacks that ask for saves of their own.
    """

    _optimizer: AMSF | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find AMSF under whatever wraps it, and look at what the Trainer was told.

        Raises:
            RuntimeError: another optimizer trains.
        """
        self._optimizer = _amsf_under(kwargs.get("optimizer"))
        groups = self._optimizer.param_groups
        averaged = any(RULES[group["averaging"]].averaged for group in groups)
        if averaged and _decays(kwargs.get("lr_scheduler"), state.max_steps):
            kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            self._optimizer._watch.warn_of_decay(f"the scheduler will lower lr ({kind})")
        if args.weight_decay and all(g["weight_decay"] != args.weight_decay for g in groups):
            logger.warning(
                "the Trainer's weight_decay=%g is not used: AMSF was built with its own, %g; say "
                "it among the optimizer's arguments",
                args.weight_decay,
                groups[0]["weight_decay"],
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer saves and evaluates right after this."""
        if self._optimizer is not None and (control.should_save or control.should_evaluate):
            self._optimizer.eval()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It may save, evaluate, load the best weights, or end here."""
        if self._optimizer is not None:
            self._optimizer.eval()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if a save has escaped."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            if RULES[group["averaging"]].averaged and group["train_mode"]:
                logger.warning(
                    "the checkpoint of step %d has the training weights y, not the average x: "
                    "another callback asked for it after AveragedWeights; give that one first",
                    state.global_step,
                )
                return


def _amsf_under(optimizer: Any) -> AMSF:
    ours = unwrapped(optimizer)
    if ours is None:
        inner = getattr(optimizer, "optimizer", optimizer)
        raise RuntimeError(
            f"AveragedWeights needs AMSF, and {type(inner).__name__} trains: give the Trainer "
            "optimizer_cls_and_kwargs=(AMSFFactory, {...}), or name AMSF in its DeepSpeed "
            "configuration"
        )
    return ours


def _decays(scheduler: Any, max_steps: int) -> bool:
    """Whether a schedule of transformers, a function of the step, goes down before the end."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # DeepSpeed's wrapper
    if not isinstance(scheduler, LambdaLR):
        return False  # seen when it happens
    stride = max(1, max_steps // _PROBES)
    for factor in scheduler.lr_lambdas:
        factors = [float(factor(step)) for step in range(0, max_steps, stride)]
        if any(later < sooner for sooner, later in zip(factors, factors[1:], strict=False)):
            return True
    return False
