"""The optimizer: its arguments, its parameters, its state; how it steps is in stepping.py."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from amsf_dist import audit, clipping, groups, loading, plan
from amsf_dist import blocks as block_rules
from amsf_dist.architecture import Facts, read_architecture
from amsf_dist.hyper import Hyper
from amsf_dist.kernels import Holding
from amsf_dist.lane import Lane
from amsf_dist.owner import Expected, Owner, is_building
from amsf_dist.progress import Progress
from amsf_dist.shards import Flats, Part, flats_of, is_partitioned
from amsf_dist.stepping import Stepping
from amsf_dist.watch import Watch

__all__ = ["AMSF"]

logger = logging.getLogger(__name__)


class AMSF(Stepping):
    """Block-wise second moments, Schedule-Free averaging, the same update under every sharding.

    A parameter is a line of numbers cut in equal blocks (an element, a row, an attention head, the
    whole tensor); every block has one second moment. The parameters hold y, where gradients are
    taken; `eval` and `averaged_parameters` put the average x in their place. All state is fp32
    (fp64 for fp64 parameters) unless `state_storage` says otherwise, and exists from construction.

    Args:
        params: a module (names, head sizes and weight layouts are read from it; build it after
            `fully_shard`), `named_parameters()`, parameters, or parameter groups.
        lr: learning rate; held constant after the warm-up unless a scheduler changes it.
        betas: beta1, weight of the average in y (schedule_free) or decay of the first moment (ema);
            beta2, decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by lr.
        averaging: "schedule_free" (arXiv 2405.15682) or "ema" (AdamW, Adam-mini).
        blocks: "auto", "adam_mini", "row", "tensor", "element", "factored", or a list of rules
            {"pattern": regex, "kind": ...}, first match wins (docs/blocks.md).
        head_dim: rows per attention head of q/k projections; None: read from the module.
        warmup_steps: steps over which lr rises linearly from lr / warmup_steps.
        r: power of the step in the weight of an iterate in the average.
        weight_lr_power: power of the highest lr so far in that weight.
        decay: "all" parameters, or "matrices": only those with two dimensions or more.
        decouple_lr: multiply weight decay by lr / max_lr instead of lr.
        max_lr: highest lr of the schedule, for `decouple_lr`; None: the group's lr.
        weight_storage: of bf16 and fp16 parameters: "auto" and "bf16+8" (8 error bits beside
            them), "bf16+16" (fp32 in two parts), "kahan", "stochastic" (rounded at random), or
            "native" (rounded to nearest: small updates are lost). docs/storage.md.
        state_storage: "auto" and "fp32"; "bf16", or "int8" with a scale per 64 numbers, both
            rounded at random.
        lr_adaptation: None.
        seed: of stochastic rounding.
        deterministic: block moments with the same bits for any number of ranks that see the same
            gradients, for a second pass over them and a second all-reduce (amsf_dist/exact.py).
        clip: "norm": all gradients by their norm, as `clip_grad_norm_` does, agreed on in the same
            all-reduce; "block": the mean square of a block's update to 1; "tensor": every
            parameter's gradient by its own past norms. docs/release.md.
        max_norm: of `clip="norm"`, which it implies.
        nonfinite: what a gradient that is not finite holds back: "step", everything, or "block",
            only the blocks that have such gradients, which lets a step read gradients once and
            move uncut blocks while ranks agree on the cut ones.

    Raises:
        TypeError, ValueError: an argument is wrong; the message has its range and the cure.

    Source: docs/algorithm.md.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        averaging: str = "schedule_free",
        blocks: str | list[dict[str, Any]] = "auto",
        head_dim: int | None = None,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        decay: str = "all",
        decouple_lr: bool = False,
        max_lr: float | None = None,
        weight_storage: str = "auto",
        state_storage: str = "auto",
        lr_adaptation: str | None = None,
        seed: int = 0,
        deterministic: bool = False,
        clip: str | None = None,
        max_norm: float | None = None,
        nonfinite: str = "step",
    ) -> None:
        """See the class."""
        hyper = Hyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            averaging=averaging,
            blocks=blocks,
            head_dim=head_dim,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            decay=decay,
            decouple_lr=decouple_lr,
            max_lr=max_lr,
            weight_storage=weight_storage,
            state_storage=state_storage,
            lr_adaptation=lr_adaptation,
            seed=seed,
            deterministic=deterministic,
            clip=clip,
            max_norm=max_norm,
            nonfinite=nonfinite,
        )
        block_rules.check(blocks)
        self._facts: dict[str, Facts] = {}
        self._flats: Flats = {}
        self._parts: list[list[tuple[Part, ...]]] = []
        self._plan: plan.Plan | None = None
        self._skipped: Tensor | int = 0
        self._square: Tensor | None = None
        self._watch, self._progress = Watch(), Progress()
        self._split: list[list[Tensor]] | None = None
        self._into_state = False
        self.optimizer_accumulation = False
        self._owner: Owner | None = Expected() if is_building() else None
        if isinstance(params, nn.Module):
            if any(is_partitioned(param) for param in params.parameters()):
                self._owner = Expected()
            self._facts, self._flats = read_architecture(params), flats_of(params)
            self._watch = Watch(params)
            params = groups.trainable(params)
        super().__init__(params, {**hyper.as_given(), "train_mode": True})
        self._warn_unmatched()
        self._ready()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts its own count of steps.

        Args:
            param_group: "params" and any hyper-parameters that differ from the constructor's.

        Raises:
            TypeError, ValueError: as the constructor; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        options = {key: param_group.get(key, value) for key, value in self.defaults.items()}
        options.pop("train_mode")
        hyper = Hyper.of(options)
        block_rules.check(hyper.blocks)
        training = all(group["train_mode"] for group in getattr(self, "param_groups", ()))
        params = groups.without_duplicates(param_group["params"])
        super().add_param_group(
            {**param_group, **hyper.as_group(), "params": params, "train_mode": training}
        )
        added = self.param_groups[-1]
        if any(is_partitioned(param) for param in added["params"]):
            self._owner = self._owner or Expected()
        if self._owner is not None:  # it has tensors of its own, and their names
            return
        try:
            self._parts.append(groups.cut_lines(added, self._facts, self._flats))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._plan is not None:  # the constructor makes the plan when all groups are there
            self._ready()

    def bind(self, owner: Owner) -> None:
        """Train the tensors of an engine from now on; what engines' integrations call.

        Args:
            owner: the engine. The state is made anew for its tensors.
        """
        for group in self.param_groups:
            if group["clip"] in clipping.NEEDS_NORMS:
                raise RuntimeError(
                    f"clip={group['clip']!r} under DeepSpeed, which clips by itself: use its "
                    '"gradient_clipping", or clip="block"'
                )
        self._owner, self._flats, self._plan = owner, owner.flats, None
        self._watch = Watch()
        self.state.clear()
        for group in self.param_groups:
            group.pop("param_names", None)  # of the model's parameters, not of these
        self._warn_unmatched()
        self._ready()

    def _ready(self) -> plan.Plan:
        """The plan, made anew when the parameters have changed under it."""
        owner = self._owner
        if owner is None:
            params = [param for group in self.param_groups for param in group["params"]]
        else:
            params = [seat.param for unit in owner.units for seat in unit]
        if self._plan is None or not plan.is_current(self._plan, params, self.state):
            units: Sequence[Sequence[groups.Seat]]
            if owner is None:
                units = groups.split(groups.seats(self.param_groups, self._parts), self._split)
            else:
                units = owner.units
            self._plan = plan.build(units, self.state, self._flats, self.is_split)
        return self._plan

    @property
    def is_owned(self) -> bool:
        """Whether an engine (DeepSpeed) keeps the weights."""
        return self._owner is not None

    @property
    def holdings(self) -> list[Holding]:
        """What this rank holds of every tensor, and its state; for checkpoints and engines."""
        return self._ready().holdings

    @property
    def lanes(self) -> list[Lane]:
        """The same, those together that share hyper-parameters and counters."""
        return [lane for unit in self._ready().units for lane in unit.lanes]

    @property
    def parts(self) -> list[Part]:
        """Every parameter that it trains, and how it is cut."""
        if self._owner is not None:
            return [part for unit in self._owner.units for seat in unit for part in seat.parts]
        return [part for group in self._parts for parts in group for part in parts]

    def _warn_unmatched(self) -> None:
        names = [part.name for part in self.parts]
        if isinstance(self._owner, Expected):
            return  # it will be bound
        for pattern in block_rules.unmatched_patterns(self.defaults["blocks"], names):
            logger.warning("blocks: pattern %r matches no parameter's name", pattern)

    def memory(self) -> dict[str, int]:
        """Bytes on this rank: "weights", "error_bits", "gap" or "exp_avg", "v", "total"."""
        return audit.memory(self._ready().holdings, self.state)

    def explain(self) -> audit.Explanation:
        """How every parameter is cut in blocks, and what that costs here; `print` it."""
        return audit.explain_holdings(self._ready().holdings)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, in either mode; see torch.optim.Optimizer.state_dict.

        Under FSDP1 the block moments, whose number here depends on the sharding, are written out
        over the elements, as FSDP's own state-dict functions need them.
        """
        self._progress.refuse_between()
        self._watch.forget_gathered()
        self._ready()  # accelerate may have put sharded parameters into the groups
        with self._owner.shown() if self._owner is not None else nullcontext():
            state_dict = loading.completed(
                super().state_dict(),
                self.param_groups,
                self.holdings,
                self.state,
                self._watch.stamps,
            )
        return state_dict if self._owner is None else {**state_dict, **self._owner.extras()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state, parameters matched by name where both sides have names.

        State keeps our dtypes (torch's own loading would round it to the parameters'). The mode is
        the saved one: after loading a checkpoint written in eval mode call `train` to go on.

        Args:
            state_dict: from `state_dict`, plain or through torch.distributed.checkpoint.

        Raises:
            ValueError: it belongs to other parameters, groups, blocks or averaging; nothing is
                changed then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        stamps = loading.load(self.param_groups, self.state, self.holdings, state_dict)
        self._watch.loaded(stamps)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's part, and what no state dict can tell."""
        kept = ("_facts", "_parts")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from pickle or deepcopy; the plan is made when it is needed."""
        self._plan = self._square = None
        self._skipped = 0
        self._watch, self._progress = Watch(), Progress()
        self._split, self._into_state, self.optimizer_accumulation = None, False, False
        self._flats, self._owner = {}, None  # process groups and engines do not travel
        super().__setstate__(state)
