"""Config files: every one that is shipped, and what is made of them."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.request
from pathlib import Path

import pytest
import torch
from jobs import write_config
from torch.distributed.checkpoint.api import CheckpointException

from amsf_dist.train import checkpoint, trackers
from amsf_dist.train.config import AdamWConfig, Config
from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError
from amsf_dist.train.memory import largest_share, predict
from amsf_dist.train.metrics import MetricsFile, read_metrics
from amsf_dist.train.optimizers import adamw_fp32, amsf_options, check_amsf, warmup_cosine
from amsf_dist.train.preflight import preflight
from amsf_dist.train.report import human_bytes

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_config(path)
    check_amsf(config)
    assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_the_quickstart_passes_every_check_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(path for path in CONFIGS if path.name == "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    preflight(load_config(path), nproc=2)
    assert not list(tmp_path.iterdir())


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    words = ["amsf.lr=1e-3", "model.config.hidden_size=64", "max_grad_norm=null", "compare=[adamw]"]
    config = load_config(write_config(tmp_path), words)
    assert config.amsf["lr"] == 1e-3 and config.model.config["hidden_size"] == 64
    assert config.max_grad_norm is None and config.compare == ["adamw"]


def test_a_baseline_is_the_same_job_in_its_own_folder(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["compare=[adamw]", "precision=bf16"])
    baseline = config.for_optimizer("adamw")
    assert baseline.output_dir == f"{config.output_dir}/adamw" and baseline.compare == []
    assert baseline.precision == "mixed"  # AdamW's bf16 weights would go stale
    assert (baseline.data, baseline.seed, baseline.steps) == (
        config.data,
        config.seed,
        config.steps,
    )


def test_a_baseline_takes_the_ordinary_step(tmp_path: Path) -> None:
    words = ["release=true", "accumulation={steps: 2, mode: state}", "clip=block"]
    config = load_config(write_config(tmp_path, compare=["adamw"]), words)
    baseline = config.for_optimizer("adamw")
    assert not baseline.release and baseline.accumulation.mode == "exact"
    assert baseline.micro_batches(1) == config.micro_batches(1) == 2
    assert Config.model_validate(baseline.model_dump()) == baseline


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], {"clip": "norm", "max_norm": 1.0}),
        (["max_grad_norm=null"], {}),
        (["clip=block"], {"clip": "block"}),
        (["amsf.deterministic=true"], {}),  # the job clips
        (["parallel=deepspeed", "deepspeed=x.json"], {}),  # DeepSpeed clips
        (["parallel=deepspeed", "deepspeed=x.json", "clip=block"], {"clip": "block"}),
    ],
)
def test_who_clips(words: list[str], wanted: dict[str, object], tmp_path: Path) -> None:
    options = amsf_options(load_config(write_config(tmp_path), words))
    assert {key: options[key] for key in ("clip", "max_norm") if key in options} == wanted


@pytest.mark.parametrize(
    "processes, words, whole",
    [
        (2, [], True),
        (2, ["release=true"], False),
        (1, ["release=true", "parallel=single"], False),
        (2, ["release=true", "accumulation.steps=3"], True),
        (2, ["release=true", "accumulation={steps: 3, mode: state}"], False),
    ],
)
def test_memory_of_gradients_is_that_of_the_largest_unit(
    processes: int, words: list[str], whole: bool, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path, parallel="fsdp2", nproc="auto"), words)
    owners, _ = predict(config, processes)
    # 32 wide: embedding and head have 320 rows, a layer q, o, k, v, three matrices and two norms
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    largest = 320 * 32 if processes == 1 else max(320 * 32, layer) // 2
    assert owners["gradients"] == (owners["weights"] if whole else 4 * largest)


@pytest.mark.parametrize(
    "processes, words, expected",
    [
        (1, [], 1),
        (2, ["micro_batch_size=1"], 3),
        (3, ["micro_batch_size=2"], 1),
        (2, ["accumulation.steps=3"], 3),
        (1, ["accumulation.steps=2", "micro_batch_size=3"], 2),
    ],
)
def test_accumulation(processes: int, words: list[str], expected: int, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), words)
    assert config.micro_batches(processes) == expected


def test_the_cosine_rises_to_one_and_falls_to_its_end() -> None:
    options = AdamWConfig(warmup_steps=4, final_lr_fraction=0.1)
    factors = [warmup_cosine(options, step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert warmup_cosine(AdamWConfig(), 19, 20) == pytest.approx(0.0)


def test_a_run_may_be_prolonged_unless_its_schedule_ends(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for optimizer, allowed in (("amsf", True), ("adamw", False)):
        config = load_config(path, [f"optimizer={optimizer}"])
        saved = checkpoint.Checkpoint(Path("step"), 6, config.model_dump(), "sha")
        longer = load_config(path, [f"optimizer={optimizer}", "steps=12", "nproc=1"])
        if allowed:
            checkpoint.check_resumable(saved, longer)
        else:
            with pytest.raises(UserError, match="steps is 12, and step was trained with 6"):
                checkpoint.check_resumable(saved, longer)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write("train", step, loss=float("nan") if step == 1 else float(step))
    file.close()
    path.write_text(path.read_text() + '{"kind": "train", "st')  # a crash
    MetricsFile(path, 2).close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, None), (2, 2.0)]
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_a_missing_tracker_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config(write_config(tmp_path), ["log.tensorboard=true"])
    with pytest.raises(UserError, match="pip install tensorboard"):
        trackers.check_trackers(config)


def test_prometheus_answers_with_the_newest_figures(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = load_config(write_config(tmp_path), [f"log.prometheus_port={port}"])
    trackers.check_trackers(config)
    (tracker,) = trackers.open_trackers(config, tmp_path)
    tracker.write(10, {"train/loss": 2.5})
    tracker.write(20, {"train/loss": 1.5, "memory/gap": 64.0})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        told = answer.read().decode().splitlines()
    assert {"amsf_step 20.0", "amsf_train_loss 1.5", "amsf_memory_gap 64.0"} <= set(told)
    with pytest.raises(UserError, match=f"log.prometheus_port={port} on 127.0.0.1: .* choose"):
        trackers.open_trackers(config, tmp_path)
    tracker.close()  # a second run of the job may have the port
    (again,) = trackers.open_trackers(config, tmp_path)
    again.close()


def test_the_first_shard_is_the_largest() -> None:
    params = [torch.empty(5, 3, device="meta"), torch.empty(7, device="meta")]
    assert largest_share(params, 1) == 1.0
    assert largest_share(params, 4) == (2 * 3 + 2) / 22
    assert sum(adamw_fp32(10).values()) == 160


def test_memory_is_predicted_for_both_optimizers(tmp_path: Path) -> None:
    amsf, adamw = predict(load_config(write_config(tmp_path)), 1)
    assert amsf["weights"] == adamw["weights"] == amsf["gradients"] == amsf["gap"]
    assert 0 < amsf["v"] < amsf["weights"] / 10
    assert human_bytes(999) == "999 B" and human_bytes(1_500_000) == "1.5 MB"


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amsf_dist.train import torch_trainer
    from amsf_dist.train.parallel import join

    config = load_config(write_config(tmp_path))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def full(*arguments: object, **options: object) -> None:
        failures = {0: (OSError("No space left on device"), None)}
        raise CheckpointException("write", failures)

    with join(config) as world:
        trainer = torch_trainer.TorchTrainer(model, optimizer, config, world)
        checkpoint.save(tmp_path, 1, trainer, config, "sha", world)
        monkeypatch.setattr(torch_trainer.dcp, "save", full)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoint.save(tmp_path, 2, trainer, config, "sha", world)
    assert checkpoint.latest(tmp_path).step == 1


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(5))
    damaged = checkpoint.Checkpoint(tmp_path, 6, {}, "sha", {"weights": 9})
    with pytest.raises(UserError, match="weights: 5 bytes of 9; delete the checkpoint"):
        checkpoint.load(damaged, lambda path: None)
