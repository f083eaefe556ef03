"""`amsf doctor`: healthy wrappers pass, and every known silent failure is found on its own line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from ranks import run_ranks
from torch import nn
from zero import put_cpu_adam

from amsf_dist import AMSF
from amsf_dist.cli import main
from amsf_dist.doctor import Finding, Setup, examine, examine_here, read_setup, report

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NAMED = {"optimizer": {"type": "AMSF", "params": {"lr": 1e-3, "head_dim": 128}}}


def deepspeed(stage: int = 0, zero: Any = None, **settings: Any) -> Setup:
    """A DeepSpeed JSON that names AMSF."""
    settings = {"gradient_clipping": 0.5, **NAMED, **settings}
    zero = {"stage": stage, **(zero or {})}
    return Setup("deepspeed", "x.json", deepspeed={**settings, "zero_optimization": zero})


def accelerate(folder: Path, **content: Any) -> Setup:
    """What `accelerate config` writes."""
    shared = {"compute_environment": "LOCAL_MACHINE", "num_processes": 8, "num_machines": 1}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**shared, **content}))
    return read_setup(path)


def with_deepspeed(folder: Path, **section: Any) -> Setup:
    return accelerate(folder, distributed_type="DEEPSPEED", deepspeed_config=section)


def in_one_group(
    cases: dict[str, tuple[Setup, Callable[..., Any]]], folder: str
) -> dict[str, list[Finding]]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    put_cpu_adam()
    found = {}
    for name, (setup, factory) in cases.items():
        inside = Path(folder) / name
        inside.mkdir(exist_ok=True)
        found[name] = examine_here(setup, factory, inside)
    return found


def examined(
    cases: dict[str, tuple[Setup, Callable[..., Any]]], world_size: int = 2
) -> dict[str, dict[str, Finding]]:
    """Case -> check -> finding; all ranks say the same."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(world_size, in_one_group, cases, folder)
    assert all(found == ranks[0] for found in ranks)
    assert all([f.check for f in case] == list(report.CHECKS) for case in ranks[0].values())
    return {name: {f.check: f for f in case} for name, case in ranks[0].items()}


def failures(findings: dict[str, Finding]) -> set[str]:
    return {check for check, finding in findings.items() if finding.status == report.FAILED}


# --- healthy --------------------------------------------------------------------------------------


def test_what_works_passes(tmp_path: Path) -> None:
    named = tmp_path / "deepspeed.json"
    settings = deepspeed(3, gradient_accumulation_steps="auto").deepspeed
    named.write_text(json.dumps({**settings, "train_micro_batch_size_per_gpu": "auto"}))
    setups = {
        "torch": Setup("plain", ""),
        "0": deepspeed(),
        "1": deepspeed(1),
        "2": deepspeed(2, OFFLOAD, gradient_accumulation_steps=2),
        "3": deepspeed(3),
        "0 ema bf16": deepspeed(**BF16, optimizer={"type": "AMSF", "params": {"averaging": "ema"}}),
        "2 bf16": deepspeed(2, **BF16, gradient_accumulation_steps=2),
        "3 bf16": deepspeed(3, **BF16),
        "2 fp16": deepspeed(2, fp16={"enabled": True}),
        "accelerate 2": with_deepspeed(tmp_path, zero_stage=2, gradient_accumulation_steps=2),
        "accelerate 3 by name": with_deepspeed(tmp_path, deepspeed_config_file=str(named)),
        "accelerate torch": accelerate(tmp_path, distributed_type="MULTI_CPU", use_cpu=True),
    }
    found = examined({name: (setup, AMSF) for name, setup in setups.items()})
    assert {name: failures(findings) for name, findings in found.items()} == {
        name: set() for name in setups
    }
    for name, findings in found.items():
        expected = {report.EVAL} if "ema" in name else set()
        assert {c for c, f in findings.items() if f.status != report.OK} == expected
        # far from the limit: what a fault must exceed is not what rounding makes
        number, exact = findings[report.UPDATE].number, name[-2:] != "16"
        assert number is not None and number < (1e-5 if exact else 0.1)
    chosen = {name: findings[report.WRAPPER].text for name, findings in found.items()}
    assert chosen["torch"] == chosen["accelerate torch"] == "DistributedDataParallel (fp32)"
    assert chosen["2"].startswith("DeepSpeedZeroOptimizer (ZeRO-2, fp32, optimizer offloaded")
    assert "3 sub-groups" in chosen["3"] and "3 sub-groups" in chosen["accelerate 3 by name"]
    assert "2 micro-batches" in chosen["accelerate 2"]


FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}
LAYERS = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


def test_fsdp_under_accelerate_passes(tmp_path: Path) -> None:
    two = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True}
    one = {"fsdp_version": 1, "fsdp_use_orig_params": False}
    setups = {
        "2": accelerate(tmp_path, distributed_type="FSDP", fsdp_config={**FSDP, **LAYERS, **two}),
        "1 flat": accelerate(tmp_path, distributed_type="FSDP", fsdp_config={**FSDP, **one}),
    }
    found = examined({name: (setup, AMSF) for name, setup in setups.items()})
    assert {name: failures(findings) for name, findings in found.items()} == {
        name: set() for name in setups
    }
    assert found["2"][report.WRAPPER].text == "fully_shard (FSDPTinyModel) (fp32)"
    assert found["1 flat"][report.WRAPPER].text == "FullyShardedDataParallel (fp32)"


# --- provoked -------------------------------------------------------------------------------------


def upstream(params: Any, **options: Any) -> Any:
    """The Schedule-Free optimizer of its authors, which knows of no engine."""
    import schedulefree

    params = params.parameters() if isinstance(params, nn.Module) else params
    keys = ("lr", "betas", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power")
    return schedulefree.AdamWScheduleFree(
        [param for param in params if param.requires_grad],
        **{key: options[key] for key in keys},
        foreach=False,
    )


class Unreduced(AMSF):
    """Every rank keeps its own part of a block's sum."""

    def update(self, unit: Any) -> None:
        for collective in unit.sums._collectives:
            collective.scatter = lambda payload, buffers: None
        super().update(unit)


class OnlyMasters(AMSF):
    """eval() does not gather the model's weights anew."""

    def bind(self, owner: Any) -> None:
        owner.publish = lambda: None
        super().bind(owner)


class Forgetful(AMSF):
    """A loaded state has lost the average."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["gap"].zero_()


ELEMENTS = {"optimizer": {"type": "AMSF", "params": {"blocks": "element"}}}


def test_every_silent_failure_is_found(tmp_path: Path) -> None:
    offloaded = with_deepspeed(tmp_path, zero_stage=2, offload_optimizer_device="cpu")
    client = Setup("deepspeed", "", {"zero_optimization": {"stage": 2, **OFFLOAD}})
    cases = {
        "replaced": (offloaded, AMSF),
        "another replaced": (offloaded, upstream),
        "handed over": (client, AMSF),
        "other name": (deepspeed(optimizer={"type": "Adam"}), AMSF),
        "upstream 1": (deepspeed(1, **ELEMENTS), upstream),
        "upstream 3": (deepspeed(3, **ELEMENTS), upstream),
        "masters 3": (deepspeed(3), OnlyMasters),
        "unreduced 2": (deepspeed(2, **BF16), Unreduced),
        "forgetful 1": (deepspeed(1), Forgetful),
        "bad argument": (deepspeed(optimizer={"type": "AMSF", "params": {"lrr": 1.0}}), AMSF),
    }
    found = examined(cases)
    missed = {name: failures(findings) for name, findings in found.items()}
    for name in ("replaced", "another replaced", "handed over", "other name"):
        assert missed.pop(name) == {report.OPTIMIZER}
    assert missed.pop("bad argument") == {report.WRAPPER}
    assert missed == {
        "upstream 3": {report.COUNTERS, report.UPDATE, report.EVAL},
        "upstream 1": {report.EVAL},
        "masters 3": {report.EVAL},
        "unreduced 2": {report.UPDATE},
        "forgetful 1": {report.CHECKPOINT},
    }

    def text(name: str, check: str) -> str:
        return found[name][check].text

    assert "silently replaced by DeepSpeedCPUAdam" in text("replaced", report.OPTIMIZER)
    assert text("another replaced", report.OPTIMIZER) == (
        "DeepSpeedCPUAdam trains in place of AdamWScheduleFree"
    )
    assert "zero_force_ds_cpu_optimizer" in found["handed over"][report.OPTIMIZER].cure
    assert "trains with Adam, not with AMSF" in text("other name", report.OPTIMIZER)
    assert text("upstream 3", report.COUNTERS).startswith("k 9; ")
    assert "it should be k 3" in text("upstream 3", report.COUNTERS)
    for name in ("upstream 1", "upstream 3", "masters 3"):
        assert text(name, report.EVAL) == "0.000 of the way from y to x, it should be 1"
    assert "lrr" in text("bad argument", report.WRAPPER)


# --- processes of its own, and the command --------------------------------------------------------


class Hanging(AMSF):
    """One rank never comes back from its second step."""

    def step(self, closure: Any = None) -> Any:
        if dist.get_rank() == 1 and any(float(s["step"]) for s in self.state.values()):
            time.sleep(1000.0)
        return super().step(closure)


def test_a_hang_is_reported_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a place of its own: other tests of this file may run beside it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    heard: list[report.Finding] = []
    told = examine(factory=Hanging, timeout=2.0, tells=heard.append)
    assert list(tmp_path.glob("amsf-doctor*")) == []
    assert not told.healthy and list(told.findings) == heard
    statuses = {finding.check: finding.status for finding in told.findings}
    assert statuses[report.WRAPPER] == statuses[report.OPTIMIZER] == report.OK
    assert statuses[report.UPDATE] == report.FAILED
    assert statuses[report.CHECKPOINT] == report.NOT_APPLICABLE
    assert "timeout" in told.log


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "amsf_dist", "doctor", "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["healthy"] and [f["status"] for f in told["findings"]] == ["ok"] * 6

    config = tmp_path / "other.json"
    config.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(config), "--nproc", "1"])
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{config}: 1 process on the CPU"
    assert any(line.startswith("optimizer not replaced") and "FAILED" in line for line in lines)
    assert any("cure:" in line for line in lines)
    assert lines[-1] == "1 of 6 checks FAILED"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), ("{", "line 1"), ("[1]", "keys and values"), ('{"lr": 1}', "none of")],
)
def test_a_bad_file_is_one_line(
    tmp_path: Path, content: str | None, says: str, capsys: Any
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(path)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith(f"amsf: {path}: ") and err.count("\n") == 1 and says in err
