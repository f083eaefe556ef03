"""Under DeepSpeed x goes where users look: forward, every kind of save, accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import OPTIONS, SHAPES, loss_of
from models import Transformer, assert_same_bits
from ranks import run_ranks
from zero import HEADS, config, engine_of, put_cpu_adam, train, weights

from amsf_dist import AMSF, reduce
from amsf_dist.integrations.deepspeed import engine as binding

SHAPE = SHAPES["even"]
STAGES: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {
        "stage": 3,
        "zero": {"sub_group_size": 500, "stage3_gather_16bit_weights_on_model_save": True},
    },
}
BF16 = {"bf16": {"enabled": True}}


def transformer() -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32)


def saves(folder: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, settings in STAGES.items():
        engine = engine_of(transformer(), config(**settings, **BF16))
        train(engine, SHAPE.vocab, range(4))
        at_y = weights(engine)
        x = engine.optimizer.averaged_state_dict(engine.module)
        assert_same_bits(weights(engine), at_y, "reading x changes nothing")
        with engine.optimizer.averaged_parameters():
            at_x = weights(engine)
            loss = float(loss_of(engine, SHAPE.vocab, 9))
            engine.save_16bit_model(folder, f"{name}.bin")
            engine.save_checkpoint(folder, tag=name)
        assert_same_bits(weights(engine), at_y, "and back")
        assert any(not torch.equal(at_x[key], at_y[key]) for key in at_x)
        assert_same_bits({key: x[key] for key in at_x}, at_x, name)

        plain = transformer().bfloat16()
        plain.load_state_dict(x)
        assert float(loss_of(plain, SHAPE.vocab, 9)) == pytest.approx(loss, rel=1e-2)
        engine.save_checkpoint(folder, tag=f"{name} y")
        dist.barrier()
        if dist.get_rank() == 0:
            saved = torch.load(f"{folder}/{name}.bin", weights_only=True)
            assert_same_bits({key: saved[key] for key in at_x}, at_x, f"{name}: save_16bit_model")
            if name != "0":
                for tag, theirs in ((name, at_x), (f"{name} y", at_y)):
                    masters = get_fp32_state_dict_from_zero_checkpoint(folder, tag)
                    rounded = {key: masters[key].bfloat16() for key in theirs}
                    assert_same_bits(rounded, theirs, f"{tag}: zero_to_fp32")
        engine.destroy()


def test_every_save_writes_what_the_mode_says(tmp_path: Path) -> None:
    run_ranks(2, saves, str(tmp_path))


def quiet() -> None:
    """No collective when nothing changes; one all-reduce per list of tensors in a step."""
    published: list[int] = []
    reduced: list[int] = []
    publish, all_reduce = binding.publish, dist.all_reduce

    def count_publish(wrapper: Any) -> None:
        published.append(1)
        publish(wrapper)

    def count_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    binding.publish = count_publish
    for name, settings in STAGES.items():
        engine = engine_of(transformer(), config(**settings, amsf={"blocks": "tensor"}))
        engine.optimizer.train()
        assert not published
        engine.optimizer.eval()
        engine.optimizer.eval()
        engine.optimizer.train()
        engine.optimizer.train()
        assert len(published) == 2
        published.clear()
        engine.backward(loss_of(engine, SHAPE.vocab, 0))
        reduce.dist.all_reduce = count_reduce
        optimizer = engine.basic_optimizer
        reduced.clear()
        step, calls = optimizer.update, []

        def counted(unit: Any, step: Any = step, calls: list[int] = calls) -> None:
            before = len(reduced)
            step(unit)
            calls.append(len(reduced) - before)
            assert calls[-1] == unit.sums.num_collectives <= 1

        optimizer.update = counted
        engine.step()
        reduce.dist.all_reduce = all_reduce
        if name == "0":
            assert calls == [0]
        else:
            assert len(calls) == len(optimizer._owner.units) and sum(calls) >= 1
        engine.destroy()


def test_collectives() -> None:
    run_ranks(2, quiet)


def through_accelerate(how: str) -> Any:
    os.environ.update(
        LOCAL_RANK=str(dist.get_rank()),
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="localhost",
        MASTER_PORT="29500",
        ACCELERATE_USE_DEEPSPEED="true",
    )
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyOptim

    settings = config(stage=3, zero={"sub_group_size": 500}, **BF16)
    options = {**OPTIONS, "head_dim": HEADS}
    if how == "offload":
        put_cpu_adam()
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    model = transformer()
    if how == "by name":
        optimizer: Any = DummyOptim(model.parameters())
    else:
        settings.pop("optimizer")
        optimizer = AMSF(model, **options)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    engine, optimizer = accelerator.prepare(model, optimizer)
    for step in range(4):
        loss = loss_of(engine, SHAPE.vocab, step, dist.get_rank(), dist.get_world_size())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    at_y = weights(engine)
    optimizer.eval()
    at_x = weights(engine)
    assert any(not torch.equal(at_x[key], at_y[key]) for key in at_x)
    optimizer.train()
    assert_same_bits(weights(engine), at_y)
    return at_x


def test_accelerate_reaches_both_modes() -> None:
    by_name = run_ranks(2, through_accelerate, "by name")
    instance = run_ranks(2, through_accelerate, "instance")
    assert_same_bits(by_name, instance)


def test_a_silent_replacement_stops_with_the_cure() -> None:
    with pytest.raises(
        AssertionError, match="silently replaced by DeepSpeedCPUAdam.*zero_force_ds"
    ):
        run_ranks(2, through_accelerate, "offload")
