"""What DeepSpeed can be told to do that cannot be right is refused when the engine is built."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from layouts import OPTIONS, SHAPES
from models import Transformer
from ranks import run_ranks
from zero import config, engine_of, train

from amsf_dist import AMSF
from amsf_dist.integrations.deepspeed import to_universal

CPU = {"device": "cpu"}
SIXTEEN_BITS = {
    "enabled": True,
    "bf16_master_weights_and_grads": True,
    "bf16_optimizer_states": True,
}
NATIVE = {"weight_storage": "native"}


def transformer() -> Transformer:
    return Transformer(SHAPES["even"], dtype=torch.float32)


def message(settings: dict[str, Any], **kwargs: Any) -> str:
    try:
        engine_of(transformer(), settings, **kwargs)
    except RuntimeError as error:
        return str(error)
    return "not refused"


def refusals(folder: str) -> dict[str, str]:
    found = {
        "elastic": message(config(stage=1, zero={"elastic_checkpoint": True})),
        "nvme": message(
            config(stage=3, zero={"offload_optimizer": {"device": "nvme", "nvme_path": folder}})
        ),
        "16 bits 1": message(config(stage=1, bf16=SIXTEEN_BITS, amsf=NATIVE)),
        "16 bits 3": message(config(stage=3, bf16=SIXTEEN_BITS, amsf=NATIVE)),
    }
    found["norm"] = message(config(stage=2, amsf={"max_norm": 0.5}))
    found["tensor"] = message(config(stage=3, amsf={"clip": "tensor"}))
    offload = config(stage=2, zero={"offload_optimizer": CPU})
    model = transformer()
    found["offload instance"] = message(offload, optimizer=AMSF(model, **OPTIONS))
    found["offload callable"] = message(offload, optimizer=lambda params: AMSF(params, **OPTIONS))
    trained = AMSF(model, **OPTIONS)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    trained.step()
    found["trained"] = message(config(stage=1), optimizer=trained)
    return found


def test_refusals_name_the_setting_and_the_cure(tmp_path: Any) -> None:
    (found,) = run_ranks(1, refusals, str(tmp_path))
    for case, words in {
        "elastic": "elastic_checkpoint: .* leave it out",
        "nvme": "offload_optimizer to nvme: .* offload to cpu",
        "16 bits 1": "masters of 16 bits .*weight_storage='auto'",
        "16 bits 3": "masters of 16 bits .*weight_storage='auto'",
        "norm": 'leave max_norm out and set "gradient_clipping": 0.5',
        "tensor": "use clip='block'",
        "offload instance": '"zero_force_ds_cpu_optimizer": false',
        "offload callable": '"zero_force_ds_cpu_optimizer": false',
        "trained": "a trained state.*load_state_dict",
    }.items():
        with pytest.raises(RuntimeError, match=words):
            raise RuntimeError(f"{found[case]}")


def with_offload_allowed() -> float:
    settings = config(stage=2, zero={"offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=False)
    model = transformer()
    engine = engine_of(model, settings, optimizer=AMSF(model, **OPTIONS))
    train(engine, SHAPES["even"].vocab, range(2))
    assert type(engine.basic_optimizer) is AMSF
    return float(next(iter(engine.basic_optimizer.state.values()))["step"])


def test_the_cure_cures() -> None:
    assert run_ranks(1, with_offload_allowed) == [2.0]


def bad_keys() -> list[str]:
    found = []
    for amsf in ({"lr": "1e-3"}, {"betas": [0.9, 1.0]}, {"warmup": 3}, {"blocks": "rows"}):
        try:
            engine_of(transformer(), config(amsf=amsf))
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_bad_params_of_the_json_are_named() -> None:
    (found,) = run_ranks(1, bad_keys)
    assert len(found) == 4
    for text, word in zip(found, ("lr", "beta2", "'warmup'", "rows"), strict=True):
        assert word in text


def zero_init_without_an_engine() -> str:
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"
    with deepspeed.zero.Init(config_dict_or_path=config(stage=3)):
        model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "not refused"


def test_partitioned_parameters_need_an_engine() -> None:
    assert "hand the optimizer" in run_ranks(1, zero_init_without_an_engine)[0]


def other_optimizer(folder: str) -> str:
    engine = engine_of(
        transformer(),
        config(stage=1),
        optimizer=torch.optim.AdamW(transformer().parameters()),
    )
    engine.save_checkpoint(folder, tag="adamw")
    return type(engine.basic_optimizer).__name__


def wrong_model(folder: str) -> list[str]:
    engine = engine_of(transformer(), config(stage=1))
    engine.save_checkpoint(folder, tag="amsf")
    found = []
    for stage, amsf in ((2, {"blocks": "tensor"}), (3, {"averaging": "ema"})):
        other = engine_of(transformer(), config(stage=stage, amsf=amsf))
        before = [
            flat.clone() for unit in other.basic_optimizer._owner.units for flat in [unit[0].param]
        ]
        try:
            other.load_checkpoint(folder, tag="amsf")
        except ValueError as error:
            found.append(str(error))
        after = [unit[0].param for unit in other.basic_optimizer._owner.units]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found


def test_checkpoints_of_something_else(tmp_path: Any) -> None:
    (found,) = run_ranks(1, wrong_model, str(tmp_path))
    assert "blocks= and head_dim= of then" in found[0] and "averaging" in found[1]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no state of AMSF"):
        to_universal(tmp_path, tmp_path / "universal", "none")
