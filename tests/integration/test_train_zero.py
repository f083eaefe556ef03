"""`amsf train` under DeepSpeed: one run at every ZeRO stage, stopped and continued anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import SMALL, metrics, train, tree, write_config
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.xdist_group("train zero")  # they share the runs below

LOSS = {"rel": 2e-6, "abs": 0}
# Partitioned in ZeRO-3 although the matrices are small.
ZERO: dict[str, Any] = {"stage3_param_persistence_threshold": 100}


# With tied weights: one parameter under two names.
MODEL = {"config": {**SMALL["model"]["config"], "tie_word_embeddings": True}}


def write_zero(directory: Path, stage: int, **changes: Any) -> Path:
    """Write a job's config and the DeepSpeed file that it names."""
    zero = {"zero_optimization": {"stage": stage, **ZERO}}
    (directory / "zero.json").write_text(json.dumps(zero))
    file = str(directory / "zero.json")
    changes = {"nproc": 2, "parallel": "deepspeed", "deepspeed": file, **changes}
    return write_config(directory, model=MODEL, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at ZeRO-2 on two processes without a pause, and of AdamW after them."""
    directory = tmp_path_factory.mktemp("whole")
    train(write_zero(directory, 2, save_every=3, compare=["adamw"]))
    return directory / "run"


@pytest.fixture(scope="module")
def single(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one process under torch, taken up where DeepSpeed had done three steps."""
    directory = tmp_path_factory.mktemp("single")
    config = write_config(directory, model=MODEL, save_every=4, compare=["adamw"])
    return continued(whole, 3, config)


def continued(source: Path, step: int, config: Path) -> Path:
    """Continue a copy of a run from an earlier checkpoint."""
    checkpoint = Path("checkpoints") / f"step_{step:08d}"
    shutil.copytree(source / checkpoint, config.parent / "run" / checkpoint)
    shutil.copy(source / "metrics.jsonl", config.parent / "run")
    _, err = train(config)
    assert f"continuing from {config.parent / 'run' / checkpoint}" in err
    return config.parent / "run"


def assert_same_losses(here: Path, there: Path) -> None:
    for kind in ("train", "validation"):
        assert metrics(here, kind) == pytest.approx(metrics(there, kind), **LOSS)


def test_resumed_equals_uninterrupted_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    resumed = continued(whole, 3, write_zero(tmp_path, 2))
    for kind in ("train", "validation"):
        assert metrics(resumed, kind) == metrics(whole, kind)
    first, second = (path / "model" / "model.safetensors" for path in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()
    assert not [name for name in tree(resumed) if "tmp" in name]


def test_one_process_at_stage_3_goes_on_from_two_at_stage_2(whole: Path, tmp_path: Path) -> None:
    assert_same_losses(continued(whole, 3, write_zero(tmp_path, 3, nproc=1)), whole)


def test_torch_goes_on_from_deepspeed_and_is_the_same_run(whole: Path, single: Path) -> None:
    assert_same_losses(single, whole)
    norms = metrics(single, "train", "grad_norm")
    assert norms == pytest.approx(metrics(whole, "train", "grad_norm"), rel=1e-5)


def test_deepspeed_goes_on_from_torch_accumulating(single: Path, tmp_path: Path) -> None:
    config = write_zero(tmp_path, 3, nproc=1, micro_batch_size=2)
    assert_same_losses(continued(single, 4, config), single)


def test_adamw_is_the_same_run_too(whole: Path, single: Path) -> None:
    assert_same_losses(whole / "adamw", single / "adamw")


def test_the_export_is_x_and_loads_in_transformers(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from amsf_dist import cli
    from amsf_dist.integrations.deepspeed import full_state_dicts

    with pytest.raises(SystemExit) as exit:
        cli.main(["export", str(whole), str(tmp_path / "out")])
    assert exit.value.code == 0
    assert capsys.readouterr().out.count("\n") == 1
    exported = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    y, saved = full_state_dicts(whole / "checkpoints" / "step_00000006")
    beta1 = saved["param_groups"][0]["betas"][0]
    for name, state in saved["state"].items():
        x = y[name] + (1 - beta1) * state["gap"]
        torch.testing.assert_close(exported[name], x, rtol=1e-6, atol=1e-7)
        assert torch.equal(exported[name], again[name])
        assert not torch.equal(exported[name], y[name])


def test_the_memory_is_as_predicted(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from amsf_dist import cli

    with pytest.raises(SystemExit):
        cli.main(["memory", str(whole.parent / "config.yaml")])
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if "total" in line)
    owners = json.loads((whole / "summary.json").read_text())["memory"]
    assert list(owners) == ["weights", "masters", "gradients", "gap", "v"]
    assert float(total[1]) * 1000 == pytest.approx(sum(owners.values()), rel=0.01)
