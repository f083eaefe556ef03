"""AMSF under accelerate, by the files of configs/accelerate: the plain loop's weights, resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerated import CONFIGS, accelerated
from layouts import OPTIONS, SHAPES, loss_of, relative_error
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import Tensor

from amsf_dist import AMSF
from amsf_dist.doctor.setup import read_setup
from amsf_dist.doctor.wrapped import whole_weights

SHAPE = SHAPES["uneven"]
MICRO_BATCHES = 2
CLIP = 0.5
STEPS = 8
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 full": ("fsdp2", {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
}
"""File, and what is changed in it."""
NO_GRADIENT = "k_proj.bias"  # softmax does not see it: its update is rounding noise at full size
EXPORTED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(MICRO_BATCHES),
    "ACCELERATE_GRADIENT_CLIPPING": str(CLIP),
    # accelerate 1.15 cannot send a buffer that is saved, which this model has, to other ranks
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def transformer(seed: int = 0) -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32, seed=seed)


def plain() -> dict[str, dict[str, Tensor]]:
    """One process, whole batches, no accelerate."""
    model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    for step in range(STEPS):
        loss_of(model, SHAPE.vocab, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    at_y = whole_weights(model)
    with optimizer.averaged_parameters():
        return {"y": at_y, "x": whole_weights(model)}


def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
    """The loop of accelerate's documentation."""
    parts = accelerator.num_processes * MICRO_BATCHES
    for step in steps:
        for micro in range(MICRO_BATCHES):
            part = accelerator.process_index * MICRO_BATCHES + micro
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, SHAPE.vocab, step, part, parts))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def both(model: Any, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """y and x; `eval` and `train` are those of what `prepare` gave back."""
    at_y = whole_weights(model)
    optimizer.eval()
    at_x = whole_weights(model)
    optimizer.train()
    assert_same_bits(whole_weights(model), at_y, "eval and train")
    return {"y": at_y, "x": at_x}


def prepared(accelerator: Any, seed: int = 0) -> Any:
    model = transformer(seed)
    return accelerator.prepare(model, AMSF(model, **OPTIONS))


def trained(kind: str, folder: str) -> Any:
    """Without a stop; and saved at y and at x, loaded over other weights, and trained on."""
    (config, changes), half, place = KINDS[kind], STEPS // 2, f"{folder}/{kind}"
    exported = {**EXPORTED, **changes}
    with accelerated(config, **exported) as accelerator:
        assert accelerator.num_processes == dist.get_world_size() > 1
        model, optimizer = prepared(accelerator)
        train(accelerator, model, optimizer, range(half))
        accelerator.save_state(f"{place} y")
        optimizer.eval()
        accelerator.save_state(f"{place} x")
        optimizer.train()
        train(accelerator, model, optimizer, range(half, STEPS))
        expected = both(model, optimizer)
    for mode in "yx":
        with accelerated(config, **exported) as accelerator:
            model, optimizer = prepared(accelerator, seed=1)
            accelerator.load_state(f"{place} {mode}")
            optimizer.train()
            train(accelerator, model, optimizer, range(half, STEPS))
            assert_same_bits(both(model, optimizer), expected, f"{kind}, saved at {mode}")
    return expected


def everywhere(folder: str) -> dict[str, Any]:
    return {kind: trained(kind, folder) for kind in KINDS}


def test_every_config_equals_the_plain_loop_and_resumes(tmp_path: Path) -> None:
    expected = plain()
    assert relative_error(expected["x"], expected["y"])[0] > 1e-3  # the modes can be told apart
    for found in run_ranks(2, everywhere, str(tmp_path)):
        for kind in KINDS:
            for mode in ("y", "x"):
                error, name = relative_error(found[kind][mode], expected[mode], NO_GRADIENT)
                assert error < 1e-5, f"{kind}, {mode}: {name} {error:.2e}"


def test_no_file_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trained_here = {config for config, _ in KINDS.values()}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*trained_here, "zero3_offload"}
    monkeypatch.chdir(CONFIGS.parents[1])  # its JSON is seen from there; test_snippets trains that
    setup = read_setup(CONFIGS / "zero3_offload.yaml")
    named = setup.environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    assert setup.speeds and Path(named).is_file()


# --- FSDP2 swaps the parameters of an optimizer that was built before -----------------------------


def blocks_of(optimizer: AMSF) -> dict[str, tuple[str, int]]:
    return {part.name: (part.blocks.kind, part.num_blocks) for part in optimizer.parts}


def built_in_other_ways() -> Any:
    found, model = {}, transformer()
    expected = blocks_of(AMSF(model, **OPTIONS))
    with accelerated("fsdp2", **EXPORTED) as accelerator:
        optimizer = AMSF(model.named_parameters(), **OPTIONS, head_dim=SHAPE.head_dim)
        model, wrapped = accelerator.prepare(model, optimizer)
        train(accelerator, model, wrapped, range(STEPS))
        assert blocks_of(optimizer) == expected
        found["named"] = both(model, wrapped)
        late = AMSF(model, **OPTIONS)  # of sharded parameters, without prepare
        assert blocks_of(late) == expected
    with accelerated("fsdp2", **EXPORTED) as accelerator:
        model = transformer()
        forgotten = AMSF(model, **OPTIONS)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        accelerator.backward(loss_of(model, SHAPE.vocab, 0))
        with pytest.raises(RuntimeError, match="build AMSF last"):
            forgotten.step()
    return found


def test_blocks_are_those_of_the_model_before_sharding() -> None:
    expected = plain()
    for found in run_ranks(2, built_in_other_ways):
        for mode in ("y", "x"):
            error, name = relative_error(found["named"][mode], expected[mode], NO_GRADIENT)
            assert error < 1e-5, f"{mode}: {name} {error:.2e}"


# --- offload, and the launcher --------------------------------------------------------------------


def offloaded() -> str:
    import deepspeed

    class NeverBuilt(torch.optim.Adam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("DeepSpeedCPUAdam was compiled for nothing")

    deepspeed.ops.adam.DeepSpeedCPUAdam = NeverBuilt
    changes = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    with accelerated("zero2", **changes) as accelerator:
        with pytest.raises(RuntimeError) as caught:
            prepared(accelerator)
        optimizer = torch.optim.AdamW(transformer().parameters())
        with pytest.raises(AssertionError, match="for nothing"):  # others are replaced as ever
            accelerator.prepare(transformer(), optimizer)
    return str(caught.value)


def test_a_replacement_is_refused_before_anything_is_compiled() -> None:
    for message in run_ranks(2, offloaded):
        assert "silently replaced by DeepSpeedCPUAdam" in message
        assert '"zero_force_ds_cpu_optimizer": false' in message and "DummyOptim" in message


def test_the_launcher_starts_processes_that_know_of_each_other(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    words = ["launch/accelerate.sh", "configs/accelerate/ddp.yaml", "examples/accelerate_train.py"]
    done = subprocess.run(
        [*words, "--steps", "4", "--output", str(tmp_path / "model")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "DEVICE": "cpu",
            "MASTER_PORT": "0",
            "NPROC_PER_NODE": "2",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(root),
        },
    )
    assert done.returncode == 0, done.stderr
    command, told = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert command.startswith("+ env ACCELERATE_USE_CPU=true ")
    assert told.startswith("2 processes (MULTI_CPU), held-out loss ")
    assert (tmp_path / "model" / "model.safetensors").is_file()
