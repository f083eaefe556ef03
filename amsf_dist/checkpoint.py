"""Go on from an AdamW, schedulefree or adam-mini checkpoint, and back to AdamW.

What is kept, what starts anew and why: docs/checkpoints.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist import kernels, upstream
from amsf_dist.groups import names_of
from amsf_dist.kernels import Holding
from amsf_dist.optimizer import AMSF
from amsf_dist.shards import copy_into, whole
from amsf_dist.state import STASH
from amsf_dist.upstream import Foreign, Saved

__all__ = ["export_state_dict", "import_state_dict"]

logger = logging.getLogger(__name__)

# Rules whose lines are known here: one each, exp_avg and gap.
_RULES = ("ema", "schedule_free")


@torch.no_grad()
def import_state_dict(
    optimizer: AMSF,
    state_dict: Mapping[str, Any],
    *,
    source: str = "auto",
    names: Sequence[str] | None = None,
) -> str:
    """Take over what another optimizer knew; load the model's weights first.

    Second moments become block means, first moments (ema) or z (schedule_free) come along, steps
    are counted on. Hyper-parameters stay those of `optimizer`. Every rank must call it.

    Args:
        optimizer: its state is replaced as a whole.
        state_dict: of torch.optim.AdamW or Adam, schedulefree.AdamWScheduleFree or
            adam_mini.Adam_mini; tensors whole on every rank, or DTensors.
        source: "adamw", "schedulefree", "adam_mini", or "auto": whichever its keys say.
        names: of the saved parameters, in the order of its groups, where it has none. Without names
            on both sides parameters are matched by order.

    Returns:
        The source. After a schedulefree checkpoint written in eval mode the parameters hold x:
        call `optimizer.train()` to go on.

    Raises:
        ValueError: it is something else, does not fit the parameters, or cannot become
            this optimizer's state; nothing is changed then.
    """
    found = upstream.read(state_dict, source)
    current = optimizer._ready()
    holdings = current.holdings
    saved = upstream.match(optimizer.param_groups, found, names)
    for holding in holdings:
        _check(holding, saved[id(holding.param)], found)

    for unit in current.units:
        unit.sums.clear()
    for holding in holdings:
        own, state = saved[id(holding.param)], optimizer.state[holding.param]
        _take_moments_(holding, own)
        _take_line_(holding, own, found)
        for counter in holding.rule.counters:
            state[counter].fill_(getattr(_counts(holding, saved, holdings), counter))
        state.pop(STASH, None)
        for error in holding.errors:  # the model's file holds all that there is of the weights
            error.zero_()
    for unit in current.units:
        unit.sums.send()
        unit.sums.agree()  # on the means of blocks cut by a shard boundary
    for holding in holdings:
        for partition in holding.partitions:
            kernels.take_means_(partition)
    averaged = any(holding.rule.averaged for holding in holdings)
    for group in optimizer.param_groups:
        group["train_mode"] = found.training or not averaged
    logger.info("took over the state of %s for %d parameters", found.source, len(holdings))
    return found.source


def _check(holding: Holding, saved: Saved, found: Foreign) -> None:
    """Refuse what was saved of one parameter before anything is changed."""
    name, shape = holding.name or saved.name or "a parameter", tuple(holding.param.shape)
    for key in ("exp_avg", "z", "exp_avg_sq"):
        value = getattr(saved, key)
        if value is None or tuple(value.shape) == shape:
            continue
        # adam_mini views first moments as heads, and keeps one second moment per block
        numel, count = holding.param.numel(), value.numel()
        fits = count and numel % count == 0 if key == "exp_avg_sq" else numel == count
        if found.source != "adam_mini" or not fits:
            raise ValueError(
                f"{name}: {key!r} was saved with shape {tuple(value.shape)}, the parameter has "
                f"{shape}; import the state of the same model"
            )
    rule, beta1 = holding.rule.name, holding.group["betas"][0]
    if rule not in _RULES:
        raise ValueError(f"{name}: averaging={rule!r} is not one that {found.source} can become")
    if found.source != "schedulefree" or not found.training:
        return
    if rule == "ema":
        raise ValueError(
            "saved in train mode, and averaging='ema' goes on from the average x: call eval() of "
            "the schedulefree optimizer, save model and optimizer again, and load both"
        )
    if saved.z is not None and (saved.betas[0] != beta1 or beta1 == 0.0):
        raise ValueError(
            f"{name}: saved in train mode with beta1={saved.betas[0]}, which says where the "
            f"weights lie between x and z; this optimizer has beta1={beta1}. Build it with the "
            "same beta1 > 0, or call eval() of the schedulefree optimizer and save again"
        )


def _take_moments_(holding: Holding, saved: Saved) -> None:
    """Write second moments of element blocks, add the means of other blocks to their sums."""
    if saved.exp_avg_sq is None:
        for partition in holding.partitions:
            partition.moments.zero_()
        return
    spread, numel = saved.exp_avg_sq, holding.param.numel()
    if spread.shape != holding.param.shape and numel:  # one number per run of the line as stored
        blocks = whole(spread).reshape(-1, 1)
        spread = blocks.expand(-1, numel // blocks.numel()).reshape(holding.param.shape)
    values = _here(holding, spread)
    values *= _same_correction(saved.step, saved.betas[1], holding.group["betas"][1])
    for partition in holding.partitions:
        kernels.gather_(partition, values)
        kernels.add_means(partition, values)


def _take_line_(holding: Holding, saved: Saved, found: Foreign) -> None:
    values = torch.zeros_like(holding.memory(holding.param), dtype=holding.compute_dtype)
    beta1 = holding.group["betas"][0]
    if holding.rule.name == "ema" and saved.exp_avg is not None:
        exp_avg = saved.exp_avg
        if exp_avg.shape != holding.param.shape:
            exp_avg = whole(exp_avg).reshape(holding.param.shape)
        values = _here(holding, exp_avg) * _same_correction(saved.step, saved.betas[0], beta1)
    elif holding.rule.name == "schedule_free" and saved.z is not None:
        # docs/algorithm.md (9): y - z = beta1 (x - z)
        values = holding.memory(holding.param).to(values.dtype) - _here(holding, saved.z)
        values /= beta1 if found.training else 1.0
    kernels.write_line_(holding, 0, values)


def _counts(holding: Holding, saved: Mapping[int, Saved], holdings: Sequence[Holding]) -> Saved:
    """Whose counters a parameter gets: its own, or its group's where nothing of it lies here.

    FSDP1 keeps no state of parameters that lie on other ranks only; they count along (plan.py).
    """
    own = saved[id(holding.param)]
    if own.step or holding.layout.numel:
        return own
    group = [saved[id(h.param)] for h in holdings if h.group is holding.group]
    return next((other for other in group if other.step), own)


def _same_correction(step: float, theirs: float, ours: float) -> float:
    """Factor of a moment after which our bias correction gives what theirs gave."""
    return 1.0 if theirs == ours or not step else (1.0 - ours**step) / (1.0 - theirs**step)


def _here(holding: Holding, saved: Tensor) -> Tensor:
    """This rank's memory of a saved tensor of the parameter's shape, a copy to compute with."""
    copied = torch.empty_like(holding.param, dtype=holding.compute_dtype, requires_grad=False)
    copy_into(copied, saved)
    return holding.memory(copied)


@torch.no_grad()
def export_state_dict(
    optimizer: AMSF, *, target: str = "adamw", full: bool = False
) -> dict[str, Any]:
    """The state in AdamW's layout, for `torch.optim.AdamW(...).load_state_dict`.

    Block moments are written out over their elements, so this takes as much memory as AdamW does.
    With `averaging="schedule_free"` the weights to go on with are x (`averaged_state_dict`), and
    the first moment starts at zero. Every rank must call it.

    Args:
        optimizer: stays as it is.
        target: "adamw".
        full: whole tensors, on the CPU of every rank, instead of DTensors.

    Returns:
        A state dict with the groups of `optimizer`; its tensors are copies.

    Raises:
        ValueError: another target, or `full` under FSDP1.
    """
    if target != "adamw":
        raise ValueError(f"target must be 'adamw', got {target!r}")
    holdings = {id(holding.param): holding for holding in optimizer.holdings}
    if full and any(holding.layout.moments_by_element for holding in holdings.values()):
        raise ValueError(
            "full=True cannot put FSDP1's slices together: export without it and pass the result "
            "to FSDP.optim_state_dict(model, optimizer, optim_state_dict=...)"
        )
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for group in optimizer.param_groups:
        params = group["params"]
        # frozen parameters have a number, but no state
        known = {n: holdings[id(p)] for n, p in enumerate(params, index) if id(p) in holdings}
        for number, holding in known.items():
            step = float(optimizer.state[holding.param]["step"])
            state[number] = _as_adamw(holding, step, full)
        options = {
            **defaults,
            "lr": float(group["lr"]),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": _weight_decay(group, list(known.values())),
            "params": list(range(index, index + len(params))),
        }
        index += len(params)
        if any(names_of(group)):
            options["param_names"] = names_of(group)
        groups.append(options)
    return {"state": state, "param_groups": groups}


def _as_adamw(holding: Holding, step: float, full: bool) -> dict[str, Tensor]:
    if holding.rule.lines == ("exp_avg",):
        exp_avg = kernels.read_line(holding, 0)
    else:
        exp_avg = torch.zeros_like(holding.memory(holding.param), dtype=holding.compute_dtype)
    moments = {"exp_avg": exp_avg, "exp_avg_sq": kernels.second_moments(holding)}
    entries = {"step": torch.tensor(step, dtype=torch.float32)}
    for key, values in moments.items():
        out = torch.empty_like(holding.param, dtype=values.dtype, requires_grad=False)
        holding.memory(out).copy_(values)
        entries[key] = whole(out).cpu() if full else out
    return entries


def _weight_decay(group: Mapping[str, Any], holdings: Sequence[Holding]) -> float:
    """AdamW's, which decays all parameters of a group and by lr * weight_decay."""
    decay = group["weight_decay"] / (group["max_lr"] if group["decouple_lr"] else 1.0)
    dims = {len(piece.part.shape) >= 2 for h in holdings for piece in h.layout.pieces}
    if decay and group["decay"] == "matrices" and dims == {True, False}:
        logger.warning(
            "decay='matrices': AdamW will also decay the vectors of this group; to keep them free, "
            "build both optimizers with a group of vectors that has weight_decay=0"
        )
    return 0.0 if group["decay"] == "matrices" and dims == {False} else float(decay)
