"""The Trainer of transformers: the plain loop's weights, x in evaluations and saves, resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import relative_error
from models import assert_same_bits
from ranks import run_ranks
from trainers import SAVE, STEPS, plain, trainer_of

from amsf_dist import AMSF
from amsf_dist.doctor.wrapped import whole_weights

SHARDED = ("fsdp2", "fsdp2 full", "zero2", "zero3", "factory zero2")


def both(trainer: Any) -> dict[str, Any]:
    """What the Trainer leaves, x, and y."""
    at_x = whole_weights(trainer.model_wrapped)
    trainer.optimizer.train()
    at_y = whole_weights(trainer.model_wrapped)
    trainer.optimizer.eval()
    assert_same_bits(whole_weights(trainer.model_wrapped), at_x)
    return {"x": at_x, "y": at_y}


def trained(kind: str, folder: str) -> dict[str, Any]:
    """Without a stop; and from the checkpoint in the middle, over other weights."""
    trainer = trainer_of(kind, folder)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    found = {"losses": losses, **both(trainer)}
    trainer.save_model(f"{folder}/end")
    found["again"] = trainer.evaluate()["eval_loss"]
    resumed = trainer_of(kind, folder, seed=1)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE}")
    assert resumed.state.global_step == STEPS
    assert_same_bits(both(resumed), {"x": found["x"], "y": found["y"]}, f"{kind}, resumed")
    return found


def all_of(kinds: tuple[str, ...], folder: str) -> dict[str, Any]:
    return {kind: trained(kind, f"{folder}/{kind}") for kind in kinds}


def check(found: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import load_file

    expected = plain()
    for kind, of in found.items():
        losses = [expected[f"loss {SAVE}"], expected[f"loss {STEPS}"]]
        assert of["losses"] == pytest.approx(losses, rel=1e-5), kind
        assert of["again"] == pytest.approx(losses[-1], rel=1e-5), kind
        for mode in "xy":
            error, name = relative_error(of[mode], expected[f"{mode} {STEPS}"])
            assert error < 1e-5, f"{kind}, {mode}: {name} {error:.2e}"
        if kind != "fsdp2":  # a sharded state dict is no model's file, and the Trainer writes none
            for step in (SAVE, STEPS):
                saved = load_file(folder / kind / f"checkpoint-{step}" / "model.safetensors")
                assert relative_error(saved, expected[f"x {step}"])[0] < 1e-5, (kind, step)
            saved = load_file(folder / kind / "end" / "model.safetensors")
            assert_same_bits(saved, of["x"], f"{kind}: save_model")
    assert relative_error(expected[f"x {STEPS}"], expected[f"y {STEPS}"])[0] > 1e-3


def alone(folder: str) -> dict[str, Any]:
    found = all_of(("alone",), folder)
    trainer = trainer_of(
        "alone",
        f"{folder}/best",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    assert trainer.state.best_global_step == SAVE
    found["alone"]["best"] = whole_weights(trainer.model)
    return found


def test_one_process(tmp_path: Path) -> None:
    (found,) = run_ranks(1, alone, str(tmp_path))
    best = found["alone"].pop("best")
    check(found, tmp_path)
    assert relative_error(best, plain()[f"x {SAVE}"])[0] < 1e-5


def test_sharded_and_replicated(tmp_path: Path) -> None:
    first, second = run_ranks(2, all_of, ("ddp", *SHARDED), str(tmp_path))
    check(first, tmp_path)
    assert_same_bits(first, second)


# --- what is told ---------------------------------------------------------------------------------


class Late:
    """Stands for a callback that asks for a save when AveragedWeights has looked already."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Saves(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_save = state.global_step == 2

        return Saves()


def told(folder: str) -> dict[str, list[str]]:
    """Kind of mistake -> warnings of amsf_dist, or the error."""
    from amsf_dist.integrations.transformers import AveragedWeights

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("amsf_dist")
    logger.addHandler(handler)
    found = {}
    mistakes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "linear": {"lr_scheduler_type": "linear"},
        "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        "warm": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        "decay": {"weight_decay": 0.3},
        "late": {"callbacks": [AveragedWeights(), Late()]},
    }
    for name, changes in mistakes.items():
        heard.clear()
        trainer_of("alone", f"{folder}/{name}", **{"save_strategy": "no", **changes}).train()
        found[name] = list(heard)
    trainer = trainer_of("alone", folder)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    found["another"] = [str(caught.value)]
    return found


def test_mistakes_are_told_once(tmp_path: Path) -> None:
    (found,) = run_ranks(1, told, str(tmp_path))
    assert found["nothing"] == found["warm"] == []
    for name in ("linear", "cosine"):
        (warning,) = found[name]
        assert f"will lower lr ({name})" in warning and 'lr_scheduler_type="constant"' in warning
    assert "weight_decay=0.3 is not used" in found["decay"][0] and len(found["decay"]) == 1
    assert "step 2 has the training weights y" in found["late"][0] and len(found["late"]) == 1
    assert "needs AMSF, and AdamW trains" in found["another"][0]


def test_a_factory_wants_lr_and_a_model() -> None:
    from amsf_dist.integrations.transformers import AMSFFactory

    model = torch.nn.Linear(2, 2)
    assert isinstance(AMSFFactory()(model, lr=1e-3), AMSF)
    with pytest.raises(ValueError, match="args.learning_rate"):
        AMSFFactory()(model, weight_decay=0.1)
    with pytest.raises(TypeError, match="optimizers="):
        AMSFFactory([{"params": list(model.parameters())}], lr=1e-3)
