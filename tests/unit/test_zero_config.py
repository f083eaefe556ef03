"""DeepSpeed's JSON and the job's YAML as one configuration; the JSON files that are shipped."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import write_config
from models import Shape, Transformer
from ranks import run_ranks
from zero import engine_of, train

from amsf_dist.train.config import Config
from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError
from amsf_dist.train.memory import predict
from amsf_dist.train.zero.config import deepspeed_config
from amsf_dist.train.zero.files import require_deepspeed
from amsf_dist.train.zero.start import wait_for_lock

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "deepspeed").glob("*.json"))


def job(directory: Path, settings: Any, *words: str) -> Config:
    """A job under DeepSpeed with a file of these settings (text: as it is)."""
    file = directory / "zero.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    changes = {"nproc": 2, "parallel": "deepspeed", "deepspeed": str(file)}
    return load_config(write_config(directory, **changes), words)


def steps_of(paths: list[Path]) -> list[float]:
    """Build an engine from each file as it is, take two steps, and return how far weights went."""
    distances = []
    for path in paths:
        model = Transformer(Shape(), dtype=torch.float32)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        settings = json.loads(path.read_text())
        engine = engine_of(model, settings)
        train(engine, Shape().vocab, range(2))
        assert engine.global_steps == 2 and engine.zero_optimization_stage() in (1, 2, 3)
        after = engine.optimizer.averaged_state_dict(engine.module)
        distances.append(max(float((after[n] - before[n]).abs().max()) for n in before))
        engine.destroy()
    return distances


def test_every_shipped_file_builds_an_engine_that_steps() -> None:
    assert [path.stem for path in FILES] == ["zero1", "zero2", "zero3", "zero3_offload"]
    (distances,) = run_ranks(1, steps_of, FILES)
    assert all(distance > 0 for distance in distances)
    assert distances == pytest.approx([distances[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_shipped_file_goes_with_the_quickstart(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / "quickstart_zero3.yaml", [f"deepspeed={path}"])
    for processes in (1, 2, 4):
        settings = deepspeed_config(config, processes)
        assert settings["train_micro_batch_size_per_gpu"] * processes == 16
        assert settings["optimizer"] == {"type": "AMSF", "params": config.amsf}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_quickstarts_are_one_job(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / f"quickstart_zero{stage}.yaml")
    plain = load_config(CONFIGS / "quickstart.yaml")
    assert config.identity() == plain.identity() and config.nproc == plain.nproc
    assert (config.steps, config.eval_every) == (plain.steps, plain.eval_every)
    assert deepspeed_config(config, 2)["zero_optimization"]["stage"] == stage


def test_the_yaml_fills_what_the_file_leaves_open(tmp_path: Path) -> None:
    auto = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": "auto",
        "optimizer": {"type": "AMSF", "params": {"lr": 1.0, "r": 5.0}},
        "zero_optimization": {"stage": 2},
    }
    words = ("micro_batch_size=1", "precision=mixed", "max_grad_norm=null")
    config = job(tmp_path, auto, *words)
    settings = deepspeed_config(config, 2)
    assert settings["train_batch_size"] == 6 and settings["gradient_accumulation_steps"] == 3
    assert settings["train_micro_batch_size_per_gpu"] == 1
    assert settings["gradient_clipping"] == 0.0 and settings["bf16"] == {"enabled": True}
    assert "fp16" not in settings
    assert settings["optimizer"]["params"] == config.amsf  # all of it, and nothing of the file's
    silent = job(tmp_path, {"zero_optimization": {"stage": 1}})
    assert deepspeed_config(silent, 2)["gradient_clipping"] == 1.0


def test_adamw_is_handed_over_by_the_job(tmp_path: Path) -> None:
    file = {"optimizer": {"type": "AMSF"}, "zero_optimization": {"stage": 3}}
    settings = deepspeed_config(job(tmp_path, file, "optimizer=adamw"), 2)
    assert "optimizer" not in settings
    assert settings["zero_force_ds_cpu_optimizer"] is False


ZERO = {"zero_optimization": {"stage": 2}}
MISTAKES = {
    "another batch": (
        {**ZERO, "train_batch_size": 8},
        "train_batch_size is 8, and global_ba",
    ),
    "another clip": ({**ZERO, "gradient_clipping": 0.5}, "max_grad_norm=1.0 makes it 1.0"),
    "another precision": ({**ZERO, "bf16": {"enabled": True}}, 'precision="fp32" makes it false'),
    "fp16": ({**ZERO, "fp16": {"enabled": True}}, "fp16.enabled is true"),
    "a section that is none": ({**ZERO, "bf16": True}, "bf16.enabled"),
    "autocast": ({**ZERO, "torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true"),
    "another optimizer": ({**ZERO, "optimizer": {"type": "Lion"}}, 'optimizer.type is "Lion"'),
    "a scheduler": ({**ZERO, "scheduler": {"type": "WarmupLR"}}, "has a scheduler; leave it out"),
    "no norm": ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "reports the nor"),
    "no stage": ({}, "zero_optimization.stage must be 1, 2 or 3, got null"),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "got 0; for copies without ZeRO use parallel"),
    "a list": ([], "holds no JSON object"),
    "half a file": ('{"zero', "line 1, column 2: not valid JSON"),
    "a key twice": ('{"bf16": {}, "bf16": {}}', "the key 'bf16' is given twice"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_agree_is_refused_in_one_line(mistake: str, tmp_path: Path) -> None:
    settings, expected = MISTAKES[mistake]
    config = job(tmp_path, settings)
    with pytest.raises(UserError) as error:
        deepspeed_config(config, 2)
    assert expected in str(error.value) and str(tmp_path / "zero.json") in str(error.value)


def test_a_missing_deepspeed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'amsf_dist\[deepspeed\]'"):
        require_deepspeed()


def test_a_whole_number_of_processes_shares_the_memory(tmp_path: Path) -> None:
    sizes = {}
    for stage in (1, 2, 3):
        amsf, adamw = predict(job(tmp_path, {"zero_optimization": {"stage": stage}}), 2)
        assert sum(amsf.values()) < sum(adamw.values())
        sizes[stage] = sum(amsf.values())
        assert amsf["weights"] == (1 if stage == 3 else 2) * amsf["masters"]
    assert sizes[1] > sizes[2] > sizes[3]


def test_a_lock_is_waited_for_and_a_stale_one_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    wait_for_lock(lock)
    lock.touch()
    begun = time.time()
    os.utime(lock, (begun, begun - 9.5))
    with pytest.raises(UserError, match=f"{lock}: .* was killed and left this lock; delete it"):
        wait_for_lock(lock, stale_seconds=10.0)
    assert 0.3 < time.time() - begun < 5.0
