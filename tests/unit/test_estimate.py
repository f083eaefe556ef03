"""Memory on paper: published sizes, bytes per parameter, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, Transformer
from torch import nn

from amsf_dist import cli
from amsf_dist.estimate import (
    ENGINES,
    Buffers,
    Cluster,
    Structure,
    amsf_recipe,
    predict,
    read_structure,
    recipes,
    rows_for,
)
from amsf_dist.estimate.ledger import Ledger

BF16, FP32 = torch.bfloat16, torch.float32


def small(vocab: int = 512) -> Structure:
    shape = Shape(vocab=vocab, dim=64, heads=4, kv_heads=2, head_dim=16, hidden=128)
    with torch.device("meta"):
        model = Transformer(shape, dtype=FP32)
    return read_structure(model, model.model.layers)


def amsf(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(["memory", *map(str, words)])
    told = capsys.readouterr()
    assert exit.value.code == 0, told.err
    return told.out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(["memory", *map(str, words)])
    told = capsys.readouterr()
    assert exit.value.code == 2 and told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_models_known_by_name_have_their_published_size(name: str, parameters: int) -> None:
    from amsf_dist.train.estimate import structure_of

    assert structure_of(name).numel == parameters


@pytest.mark.parametrize(
    ("options", "bytes_per_parameter"),
    [
        ({"weight_storage": "bf16+16"}, 2 + 2 + 4 + 2),
        ({"weight_storage": "bf16+8"}, 2 + 1 + 4 + 2),
        ({"weight_storage": "kahan"}, 2 + 2 + 4 + 2),
        ({"weight_storage": "bf16+8", "state_storage": "bf16"}, 2 + 1 + 2 + 2),
        ({"weight_storage": "bf16+8", "state_storage": "int8"}, 2 + 1 + 1 + 2 / 64 + 2),
        ({"weight_storage": "stochastic", "state_storage": "int8"}, 2 + 1 + 2 / 64 + 2),
        ({"weight_storage": "native", "averaging": "ema"}, 2 + 4 + 2),
    ],
)
def test_bytes_per_parameter_on_one_gpu(
    options: dict[str, Any], bytes_per_parameter: float
) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 4096, bias=False), nn.Linear(4096, 64, bias=False))
    row = predict(
        read_structure(model), amsf_recipe("", BF16, BF16, **options), "single", Cluster(1)
    )
    moments = row.owners.pop("v")
    assert moments == 4 * (4096 + 64)
    assert row.per_parameter == bytes_per_parameter


def test_the_other_optimizers() -> None:
    with torch.device("meta"):
        structure = read_structure(nn.Linear(1024, 1024, bias=False))
    found = {row.name: row for row in rows_for(structure, "single", Cluster(1), BF16)}
    assert found["AdamW"].per_parameter == 4 + 4 + 4 + 4
    assert found["FlashAdamW"].per_parameter == 2 + 1 + 2 * (1 + 2 / 32) + 2
    assert found["Adam-mini"].per_parameter == 4 + 4 + 4 + 4 / 1024
    assert found["AMSF fp32"].total < found["AdamW"].total


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_shards_get_smaller_and_what_is_whole_stays(engine: str) -> None:
    buffers = Buffers(reduce_bucket=20_000, prefetch=10_000, live=30_000, reuse=1, persistent=100)
    structure = small()
    recipe = recipes(engine.startswith("zero"), FP32)[0]
    rows = [
        predict(structure, recipe, engine, Cluster(gpus, buffers=buffers)) for gpus in (2, 4, 8, 16)
    ]
    totals = [row.total for row in rows]
    assert totals == sorted(totals, reverse=True)
    state = [row.owners["exp_avg"] for row in rows]
    assert state[0] == pytest.approx(4 * structure.numel / 2, rel=0.01)
    assert state[3] == pytest.approx(4 * structure.numel / 16, rel=0.01)
    whole = 4 * structure.numel if engine in ("zero1", "zero2") else 0
    assert totals[3] > whole


def test_ddp_is_a_copy_and_its_buckets() -> None:
    structure = small()
    for recipe in recipes(False, BF16):
        alone = predict(structure, recipe, "single", Cluster(1))
        ddp = predict(structure, recipe, "ddp", Cluster(8))
        assert ddp.total - alone.total == structure.numel * recipe.stored.itemsize


def test_replicas_hold_what_their_shards_hold_and_the_sums_over_replicas() -> None:
    structure = small()
    for recipe in recipes(False, BF16):
        plain = predict(structure, recipe, "fsdp2", Cluster(4))
        hybrid = predict(structure, recipe, "fsdp2", Cluster(8, replicas=2))
        kept = 4 * structure.numel / 4 if recipe.stored == BF16 else 0  # reduced in fp32
        assert plain.total <= hybrid.total <= 1.01 * (plain.total + kept)
        assert plain.owners["weights"] == hybrid.owners["weights"]


def test_fsdp2_on_one_gpu_still_makes_whole_weights() -> None:
    structure = small()
    recipe = recipes(False, BF16)[0]
    row, alone = (
        predict(structure, recipe, "fsdp2", Cluster(1)),
        predict(structure, recipe, "single", Cluster(1)),
    )
    assert row.owners["weights"] == alone.owners["weights"]
    assert row.gathered > 0 and alone.gathered == 0


def test_buckets_of_deepspeed_are_read_from_its_file() -> None:
    told = {"reduce_bucket_size": 5e6, "stage3_prefetch_bucket_size": "auto", "overlap_comm": True}
    assert Buffers.of(told) == Buffers(reduce_bucket=5_000_000, two_buckets=True)
    structure, recipe = small(), recipes(True, FP32)[0]
    for engine in ("zero1", "zero2", "zero3"):
        default = predict(structure, recipe, engine, Cluster(2))
        assert default.owners["reduced"] >= 4 * 500_000_000
        little = predict(structure, recipe, engine, Cluster(2, buffers=Buffers(10_000)))
        assert little.total < default.total


def test_the_ledger_remembers_the_fullest_moment() -> None:
    ledger = Ledger({"weights": 10})
    ledger.take("gathered", 5)
    ledger.give("gathered", 5)
    ledger.take("reduced", 4)
    assert ledger.at_the_fullest() == {"weights": 10, "gathered": 5}
    assert ledger.most["reduced"] == 4
    with pytest.raises(AssertionError):
        ledger.give("gathered", 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_command_knows_every_engine(
    engine: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("gpt2", "--engine", engine, "--dtype", dtype)
    table = amsf(capsys, *words)
    assert "124,439,808 parameters" in table and "AdamW" in table and "int8 gap" in table
    rows = json.loads(amsf(capsys, *words, "--json"))["rows"]
    assert all(row["total"] == sum(row["owners"].values()) for row in rows)
    assert [row["name"] for row in rows if row["name"] not in table] == []


def test_the_command_reads_directories_files_and_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2", n_layer=2, vocab_size=64, n_embd=32, n_head=2)
    config.save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        table = amsf(capsys, model, "--gpus", 2)
        assert "fsdp2 on 2 GPUs, bf16" in table and "gathered at once" in table
    job = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert "AMSF bf16+8" in amsf(capsys, job, "model.config.hidden_size=64", "--gpus", 2)


def test_the_command_refuses_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean llama-3.1-8b?" in refused(capsys, "llama-3.1-8")
    assert "must be one of single, ddp" in refused(capsys, "gpt2", "--engine", "zero4")
    assert "bf16 or fp32" in refused(capsys, "gpt2", "--dtype", "fp8")
    assert "must be 1 for single" in refused(capsys, "gpt2", "--engine", "single", "--gpus", 2)
    assert "divide the 8 gpus" in refused(capsys, "gpt2", "--replicas", 3)
    assert "go with fsdp2, not ddp" in refused(capsys, "gpt2", "--engine", "ddp", "--replicas", 2)
    assert "config.json does not exist" in refused(capsys, tmp_path)
    assert "YAML of a job" in refused(capsys, "gpt2", "steps=3")
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"offload_param": {"device": "cpu"}}}')
    assert "goes with --engine zero1" in refused(capsys, "gpt2", "--deepspeed", file)
    told = refused(capsys, "gpt2", "--engine", "zero3", "--deepspeed", file)
    assert "offload_param is not predicted" in told


def test_release_keeps_the_gradients_of_one_unit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("llama-3.1-8b", "--engine", "fsdp2", "--gpus", 8, "--json")
    released, ordinary = (
        {row["name"]: row for row in json.loads(amsf(capsys, *words, *more))["rows"]}
        for more in (("--release",), ())
    )
    assert released["AdamW"] == ordinary["AdamW"]
    name = "AMSF bf16+8, int8 gap"
    saved = ordinary[name]["total"] - released[name]["total"]
    # at most 16 bits of the shard; another moment is the fullest now: the reduction of the head
    assert 0.6 < saved / (2 * 8.03e9 / 8) < 1.0
    assert "gradients" not in released[name]["owners"]
    assert "released" not in refused(capsys, "gpt2", "--engine", "zero2", "--release")
