"""What `amsf doctor` reads from a file, what it makes of it for three steps, and its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reference import ScheduleFreeReference

from amsf_dist.doctor.model import TinyModel, batches
from amsf_dist.doctor.reference import Compute, Reference, gradients
from amsf_dist.doctor.setup import needed, read_setup
from amsf_dist.doctor.trial import options_for, scaled
from amsf_dist.train.errors import UserError

pytest.importorskip("accelerate")
pytest.importorskip("hjson")

DEVICE = torch.device("cpu")


def written(folder: Path, content: Any, name: str = "accelerate.yaml") -> Path:
    path = folder / name
    dump = json.dumps if name.endswith("json") else yaml.safe_dump
    path.write_text(content if isinstance(content, str) else dump(content))
    return path


def cluster(**content: Any) -> dict[str, Any]:
    shared = {"compute_environment": "LOCAL_MACHINE", "num_machines": 4, "machine_rank": 3}
    return {**shared, "num_processes": 32, "main_process_port": 1, **content}


# --- reading --------------------------------------------------------------------------------------


def test_nothing_is_torch_alone() -> None:
    assert read_setup(None).kind == "plain"


def test_deepspeed_json_may_have_comments(tmp_path: Path) -> None:
    text = '{\n  // as DeepSpeed reads it\n  "zero_optimization": {"stage": 2},\n}'
    setup = read_setup(written(tmp_path, text, "config.json"))
    assert setup.kind == "deepspeed" and setup.speeds
    assert setup.deepspeed["zero_optimization"]["stage"] == 2


def test_accelerate_with_deepspeed(tmp_path: Path) -> None:
    section = {"zero_stage": 3, "gradient_clipping": 0.7, "offload_optimizer_device": "cpu"}
    content = cluster(distributed_type="DEEPSPEED", deepspeed_config=section)
    setup = read_setup(written(tmp_path, {**content, "mixed_precision": "bf16"}))
    assert setup.kind == "accelerate" and setup.speeds and not setup.shards
    told = setup.environment
    assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert told["ACCELERATE_GRADIENT_CLIPPING"] == "0.7"
    assert told["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"
    assert told["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert all(key.startswith(("ACCELERATE_", "FSDP_")) for key in told)


def test_accelerate_with_fsdp_wraps_the_tiny_models_layers(tmp_path: Path) -> None:
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_ignored_modules": "vision",
    }
    setup = read_setup(written(tmp_path, cluster(distributed_type="FSDP", fsdp_config=fsdp)))
    assert setup.shards and setup.freezes and not setup.speeds
    assert setup.environment["FSDP_VERSION"] == "2"
    assert setup.environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Layer"
    assert "FSDP_IGNORED_MODULES" not in setup.environment
    flat = {"fsdp_version": 1, "fsdp_use_orig_params": False}
    setup = read_setup(written(tmp_path, cluster(distributed_type="FSDP", fsdp_config=flat)))
    assert not setup.freezes


def test_accelerate_without_processes_has_one(tmp_path: Path) -> None:
    assert read_setup(written(tmp_path, cluster(distributed_type="NO"))).processes == 1
    setup = read_setup(written(tmp_path, cluster(distributed_type="MULTI_CPU", use_cpu=True)))
    assert setup.processes is None and setup.on_cpu


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("steps: 3", "c.yaml", "no distributed_type in it"),
        ("- 1", "c.yaml", "it must hold keys and values, got list"),
        ("a: [", "c.yaml", "c.yaml: while parsing"),
        ({"model": {}}, "c.json", "none of zero_optimization, optimizer"),
        ({"zero_optimization": 2}, "c.json", "zero_optimization must be a section, got 2"),
        (cluster(distributed_type="MEGATRON_LM"), "c.yaml", "MEGATRON_LM on LOCAL_MACHINE cannot"),
        (cluster(distributed_type="FSDP", what=1), "c.yaml", "unknown keys (['what'])"),
        (
            cluster(distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": "no"}),
            "c.yaml",
            "no: no such file",
        ),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, content: Any, name: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_setup(written(tmp_path, content, name))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_its_extra() -> None:
    with pytest.raises(UserError, match=r"pip install 'amsf-dist\[deepspeed\]'"):
        needed("no_such_library", "deepspeed")


# --- fitting --------------------------------------------------------------------------------------


def test_what_decides_the_code_stays_and_sizes_become_small() -> None:
    zero = {"stage": 3, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "overlap_comm": True}
    config = {
        "train_batch_size": 512,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {**zero, "zero_hpz_partition_size": 8},
        "scheduler": {"type": "WarmupLR"},
        "wandb": {"enabled": True},
        "checkpoint": {"load_universal": True},
    }
    trial = scaled(config, world_size=2)
    assert trial.config["train_micro_batch_size_per_gpu"] == 2
    assert trial.config["gradient_accumulation_steps"] == 4
    assert trial.config["gradient_clipping"] == 1.0
    assert trial.config["bf16"] == {"enabled": True} and trial.config["fp16"] == {}
    fitted = trial.config["zero_optimization"]
    assert fitted["stage"] == 3 and fitted["overlap_comm"] is True
    assert fitted["sub_group_size"] == 500 and fitted["zero_hpz_partition_size"] == 2
    assert "reduce_bucket_size" not in fitted
    assert not {"train_batch_size", "scheduler", "wandb"} & trial.config.keys()
    told = " ".join(trial.notes)
    for word in ("scheduler", "load_universal", "zero_hpz", "4 micro-batches per step in place of"):
        assert word in told
    assert config["train_batch_size"] == 512 and trial.named is None


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 3}, 3),
        ({"gradient_accumulation_steps": "auto"}, 1),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, 3),
        ({"train_batch_size": 24}, 1),
    ],
)
def test_accumulation_follows_from_the_batch_sizes(settings: dict[str, Any], steps: int) -> None:
    assert scaled(settings, world_size=2).config["gradient_accumulation_steps"] == steps


def test_arguments_are_the_users_but_lr_warmup_and_sizes() -> None:
    params = {"lr": 3e-4, "betas": "auto", "beta": 1, "head_dim": 128, "warmup_steps": 500}
    trial = scaled({"optimizer": {"type": "AMSF", "params": params}}, world_size=2)
    assert trial.named == "AMSF" and trial.config["optimizer"]["type"] == "AMSF"
    assert trial.options["lr"] == 0.02 and trial.options["warmup_steps"] == 4
    assert trial.options["betas"] == (0.9, 0.99)
    assert trial.options["beta"] == 1  # AMSF itself says what is wrong with it
    assert "head_dim" not in trial.options


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["auto", "element", "tensor"])
def test_the_reference_is_the_one_of_the_tests(blocks: str) -> None:
    model = TinyModel()
    options = {**options_for({}), "blocks": blocks, "r": 1.0, "decay": "matrices"}
    ours = Reference(model, options)
    plain = {name: value.clone() for name, value in ours.start.items()}
    theirs = ScheduleFreeReference(plain.items(), ours.block_numel, **options)
    for step in range(5):
        grads = gradients(model, ours.y, batches(step, 2, DEVICE), Compute())
        ours.step(grads, clip=0.5)
        norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
        for name, param in plain.items():
            param.grad = grads[name] * min(1.0, 0.5 / (norm + 1e-6))
        theirs.step()
    for name, param in plain.items():
        assert torch.allclose(ours.y[name], param, rtol=1e-12, atol=1e-14), name
        assert torch.allclose(ours.x[name], theirs.x[name], rtol=1e-12, atol=1e-14), name
    assert ours.weight_sum == pytest.approx(theirs.sum_of_weights)


def test_without_averaging_the_reference_is_adamw() -> None:
    model = TinyModel()
    given = {"averaging": "ema", "blocks": "element"}
    options = {**options_for(given), "warmup_steps": 0}
    ours = Reference(model, options)
    plain = {name: value.clone().requires_grad_() for name, value in ours.start.items()}
    keys = ("lr", "betas", "eps", "weight_decay")
    theirs = torch.optim.AdamW(plain.values(), **{key: options[key] for key in keys})
    for step in range(3):
        grads = gradients(model, ours.y, batches(step, 2, DEVICE), Compute())
        ours.step(grads)
        for name, param in plain.items():
            param.grad = grads[name]
        theirs.step()
    for name, param in plain.items():
        assert torch.allclose(ours.y[name], param, rtol=1e-12, atol=1e-14), name


def test_the_tiny_model_has_the_awkward_traits() -> None:
    model = TinyModel()
    names = dict(model.named_parameters())
    assert model.lm_head.weight is model.embed_tokens.weight and "lm_head.weight" not in names
    assert not names["position.weight"].requires_grad
    blocks = Reference(model, options_for({})).block_numel
    assert blocks["layers.0.self_attn.q_proj.weight"] == 5 * 12  # a head, not dim / heads rows
    assert blocks["layers.0.mlp.up_proj.weight"] == 12
    assert blocks["layers.0.self_attn.q_proj.bias"] == 1
