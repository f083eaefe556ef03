"""The study in benchmarks/convergence: what its table relies on."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.convergence import record, table, text
from benchmarks.convergence.optimizers import BUILDERS, averaged
from benchmarks.convergence.plan import COMPARED, REFERENCE, SETS, WHY, settings_of
from benchmarks.convergence.setting import Setting
from benchmarks.convergence.train import measured_bytes
from benchmarks.convergence.trainee import Trainee, Working


@pytest.fixture(scope="module")
def working():
    return Working("cpu", compiled=False)


def test_no_held_out_paragraph_shares_a_long_run_with_the_training_text():
    licence = (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this."
    )
    pages = [
        f"page {i} says this alone\n\n{licence if i % 2 else licence[:-5]} {i}" for i in range(70)
    ]
    train, held_out = text.split(pages)
    assert held_out and train
    trained = " ".join(" ".join(p.split()) for page in train for p in page)
    for page in held_out:
        for paragraph in page:
            plain = " ".join(paragraph.split())
            for start in range(len(plain) - text.LONGEST_SHARED + 1):
                assert plain[start : start + text.LONGEST_SHARED] not in trained
    assert "page 0 says this alone" in trained  # only what is shared was dropped


def test_a_repeated_paragraph_is_kept_once():
    train, held_out = text.split(["one\n\ntwo", "two\n\nthree", " one \n  \nfour"])
    assert [p.strip() for page in train + held_out for p in page] == ["one", "two", "three", "four"]


def test_a_run_is_found_by_what_decides_it_and_not_by_its_name(tmp_path):
    setting = Setting("before", "amsf", {"betas": [0.9, 0.99]}, clip=None)
    path = tmp_path / "record.jsonl"
    record.append(path, {"setting": setting.identity(), "seed": 1, "steps": 7, "held_out": 1.0})
    lines = record.read(path)
    renamed = setting.but("after")
    assert record.find(lines, renamed, 1, 7)["held_out"] == 1.0
    assert record.find(lines, renamed, 0, 7) is None
    assert record.find(lines, renamed, 1, 8) is None
    assert record.find(lines, setting.but("other", clip=1.0), 1, 7) is None
    assert record.find(lines, setting.but("other", betas=[0.9, 0.95]), 1, 7) is None


def test_every_seed_starts_from_its_own_weights_and_bf16_from_the_rounded_ones(working):
    first = [p.detach().clone() for p in Trainee(working, "fp32", 0).owned.parameters()]
    other = [p.detach().clone() for p in Trainee(working, "fp32", 1).owned.parameters()]
    half = list(Trainee(working, "bf16", 0).owned.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, half, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b)


def test_the_forward_reads_the_bf16_weights_and_their_gradient_is_the_fp32_one_rounded(working):
    windows = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    half = Trainee(working, "bf16", 0)
    loss = half.backward(windows)
    whole = Trainee(working, "fp32", 0)
    with torch.no_grad():
        for there, here in zip(whole.owned.parameters(), half.owned.parameters(), strict=True):
            there.copy_(here)
    assert whole.backward(windows) == loss
    for there, here in zip(whole.owned.parameters(), half.owned.parameters(), strict=True):
        assert torch.equal(there.grad.to(torch.bfloat16), here.grad)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "flash" not in name])
def test_bytes_are_those_of_the_distinct_storages(working, name):
    if name in ("adam_mini", "adamw_schedule_free"):
        pytest.importorskip("adam_mini" if name == "adam_mini" else "schedulefree")
    trainee = Trainee(working, "fp32", 0)
    options = {"lr": 1e-3, "betas": [0.9, 0.99], "warmup_steps": 5}
    optimizer = BUILDERS[name](trainee.owned, options, 0)
    if hasattr(optimizer, "train"):
        optimizer.train()
    trainee.backward(torch.zeros(1, 9, dtype=torch.int64))
    optimizer.step()
    found = measured_bytes(list(trainee.owned.parameters()), optimizer)
    assert found["weights"] == 4 * trainee.numel
    lines = 2 if name in ("adamw", "adamw_schedule_free") else 1
    assert lines * 4.0 <= found["state"] / trainee.numel < lines * 4.0 + 0.1


def test_bytes_of_flash_adamw_in_torch_operations(working):
    trainee = Trainee(working, "bf16", 0)
    options = {"lr": 1e-3, "betas": [0.9, 0.99], "warmup_steps": 5}
    optimizer = BUILDERS["portable_flash_adamw"](trainee.owned, options, 0)
    trainee.backward(torch.zeros(1, 9, dtype=torch.int64))
    optimizer.step()
    found = measured_bytes(list(trainee.owned.parameters()), optimizer)
    assert found["weights"] == 2 * trainee.numel
    # error bits and two moments in a byte each, a scale of two bytes for 32 numbers of a moment
    assert 3.125 <= found["state"] / trainee.numel < 3.2


def test_the_weights_to_evaluate_are_the_average_and_training_goes_on_from_where_it_was(working):
    trainee = Trainee(working, "bf16", 0)
    options = {"lr": 1e-2, "betas": [0.9, 0.99], "state_storage": "bf16"}
    optimizer = BUILDERS["amsf"](trainee.owned, options, 0)
    for _ in range(3):
        trainee.backward(torch.arange(18).view(2, 9))
        optimizer.step()
    before = [p.detach().clone() for p in trainee.owned.parameters()]
    with averaged(optimizer):
        assert any(
            not torch.equal(a, b) for a, b in zip(before, trainee.owned.parameters(), strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.owned.parameters(), strict=True))


def test_names_are_unique_and_what_is_compared_can_be_run():
    by_name: dict[str, Setting] = {}
    for setting in (setting for settings in SETS.values() for setting in settings):
        assert by_name.setdefault(setting.name, setting).identity() == setting.identity()
        assert setting.optimizer in BUILDERS
        json.dumps(setting.identity())
    assert {setting.name for setting in COMPARED} <= by_name.keys()
    assert REFERENCE in {setting.name for setting in COMPARED}
    assert WHY.keys() <= SETS.keys()
    with pytest.raises(KeyError, match="see `list`"):
        settings_of(["no such setting"])


def test_differences_are_taken_seed_by_seed_and_a_diverged_run_is_said():
    def run(seed, loss):
        size = {"weights": 40, "state": 40}
        return {
            "seed": seed,
            "held_out": loss,
            "train": loss,
            "bytes": size,
            "parameters": 10,
            "seconds": 1,
        }

    base = table.Row(Setting("base", "adamw"), [run(0, 1.0), run(1, 2.0)])
    ours = table.Row(Setting("ours", "amsf"), [run(0, 1.1), run(1, 2.0)])
    lost = table.Row(Setting("lost", "amsf"), [run(0, None), run(1, 2.0)])
    lines = table.comparison([lost, ours, base], "base").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| **base**", "| ours", "| lost"]
    assert "+5.0 % (+0.0 .. +10.0)" in lines[3]
    assert "8.00: 4 + 4.00" in lines[3]
    assert "diverged" in lines[4]
