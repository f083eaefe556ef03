"""Saved numbers into the tensors of an engine, wherever they were cut when they were saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from amsf_dist.hyper import Hyper
from amsf_dist.integrations.deepspeed.pieces import describe
from amsf_dist.integrations.deepspeed.saved import Saved
from amsf_dist.integrations.deepspeed.weights import copy_weights
from amsf_dist.kernels import Holding
from amsf_dist.loading import FIXED
from amsf_dist.optimizer import AMSF
from amsf_dist.portable import refuse_codes_alone, scale_key, take_line_
from amsf_dist.shards import Flats
from amsf_dist.storage.grouped import SCALE_DTYPE

__all__ = ["fill"]


@torch.no_grad()
def fill(optimizer: AMSF, flats: Flats, saved: Saved, with_state: bool = True) -> None:
    """Take over weights, state and options; the caller publishes the weights.

    Args:
        optimizer: bound to an engine.
        flats: which parts of which parameters lie in its tensors.
        saved: names every parameter of the optimizer.
        with_state: False: the weights alone; the state stays as it is.

    Raises:
        ValueError: it belongs to another model, other blocks or another averaging; nothing is
            changed then.
    """
    for holding, record in _records(optimizer, flats):
        _check(holding, record, saved)
    for holding, record in _records(optimizer, flats):
        copy_weights(holding, optimizer.state[holding.param], record, saved)
        if with_state:
            _copy_state(holding, optimizer.state[holding.param], record, saved)
    if not with_state:
        return
    for holding in optimizer.holdings:
        for index in range(len(holding.lines)):
            _copy_line(holding, index, describe(holding, flats), saved)
    for group in optimizer.param_groups:
        names = [
            record["name"]
            for holding, record in _records(optimizer, flats)
            if holding.group is group
        ]
        options = saved.groups[saved.group_of[names[0]]]
        changes = {key: value for key, value in options.items() if key not in FIXED}
        known = Hyper.__dataclass_fields__
        Hyper.of({key: value for key, value in changes.items() if key in known})
        group.update(changes)


def _records(optimizer: AMSF, flats: Flats) -> Iterator[tuple[Holding, dict[str, Any]]]:
    for holding in optimizer.holdings:
        for record in describe(holding, flats):
            yield holding, record


def _check(holding: Holding, record: dict[str, Any], saved: Saved) -> None:
    name = record["name"]
    if name not in saved.fragments:
        raise ValueError(
            f"the checkpoint knows no parameter named {name!r} (it has "
            f"{sorted(saved.fragments)[:3]} and {len(saved.fragments)} in all); load the "
            "checkpoint of the same model"
        )
    if saved.shapes[name] != tuple(record["shape"]):
        raise ValueError(
            f"{name}: saved with shape {saved.shapes[name]}, this model has {record['shape']}"
        )
    for key, ours in record["moments"].items():
        theirs = saved.block_numel[name].get(key)
        if theirs != ours["block_numel"]:
            then = f"with blocks of {theirs} numbers" if theirs else f"without {key!r}"
            raise ValueError(
                f"{name}: saved {then}, this optimizer has blocks of {ours['block_numel']}; build "
                "it with the blocks= and head_dim= of then"
            )
    averaging = saved.groups[saved.group_of[name]]["averaging"]
    if averaging != holding.group["averaging"]:
        raise ValueError(
            f"{name}: saved with averaging={averaging!r}, this optimizer has "
            f"{holding.group['averaging']!r}; build it with the saved one"
        )


def _copy_state(
    holding: Holding, state: dict[str, Any], record: dict[str, Any], saved: Saved
) -> None:
    name = record["name"]
    for partition in holding.partitions:
        if at := record["moments"].get(partition.key):
            moments = partition.moments[at["first_moment"] :][: at["num_moments"]]
            saved.read_moments(name, partition.key, at["first_block"], moments)
    for counter in holding.rule.counters:
        state[counter].fill_(saved.counters[name][counter])


def _copy_line(
    holding: Holding, index: int, records: Sequence[dict[str, Any]], saved: Saved
) -> None:
    name = holding.rule.lines[index]
    memory = holding.memory(holding.param)
    parts = saved.fragments[records[0]["name"]]
    for part in parts:
        if name in part.lines:
            refuse_codes_alone(records[0]["name"], name, part.lines[name].dtype, part.lines)
    codes = any(scale_key(name) in part.lines for part in parts)
    values = torch.zeros_like(memory, dtype=torch.int8 if codes else holding.compute_dtype)
    scales = torch.zeros_like(memory, dtype=SCALE_DTYPE) if codes else None
    for record in records:
        start, stop = record["start"], record["stop"]
        here = slice(record["offset"], record["offset"] + stop - start)
        saved.read(record["name"], name, start, stop, values.view(-1)[here])
        if scales is not None:
            key = scale_key(name)
            saved.read(record["name"], key, start, stop, scales.view(-1)[here])
    take_line_(holding, index, values, scales)
