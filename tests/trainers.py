"""The Trainer of transformers on CPU processes, and the plain loop that it must equal."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amsf_dist import AMSF

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 3, "decay": "matrices"}
STEPS, SAVE, GLOBAL_BATCH, VOCAB, LENGTH = 6, 3, 8, 23, 9
CLIP = 1.0


def llama(seed: int = 0) -> Any:
    """Grouped queries, heads that are not width / heads wide, sizes that two ranks cut unevenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=21,
            intermediate_size=27,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=6,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def sequences(count: int = STEPS * GLOBAL_BATCH, seed: int = 1) -> list[dict[str, Tensor]]:
    """Sentences of counting, so that there is something to learn."""
    made = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCAB, (count, 1), generator=made)
    steps = torch.randint(1, 4, (count, 1), generator=made)
    tokens = (starts + steps * torch.arange(LENGTH)) % VOCAB
    return [{"input_ids": row, "labels": row} for row in tokens]


def held_out() -> list[dict[str, Tensor]]:
    return sequences(8, seed=2)


def loss_of(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    tokens = torch.stack([row["input_ids"] for row in rows])
    return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]


def plain() -> dict[str, Any]:
    """What one process does with whole batches: weights at y and x, losses at x where it saves."""
    model, data, found = llama(), sequences(), {}
    optimizer = AMSF(model, **OPTIONS)
    for step in range(STEPS):
        loss_of(model, data[step * GLOBAL_BATCH :][:GLOBAL_BATCH]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE == 0:
            found[f"y {step + 1}"] = copy_of(model)
            with optimizer.averaged_parameters(), torch.no_grad():
                found[f"x {step + 1}"] = copy_of(model)
                found[f"loss {step + 1}"] = float(loss_of(model, held_out()))
    return found


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def deepspeed_json(stage: int) -> dict[str, Any]:
    """As a user writes it who leaves to the Trainer what the Trainer knows."""
    params = {**OPTIONS, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    return {
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 2000,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "optimizer": {"type": "AMSF", "params": params},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def trainer_of(kind: str, folder: str, seed: int = 0, **changes: Any) -> Any:
    """A Trainer under "alone", "ddp", "fsdp2", "fsdp2 full", "zero2", "zero3", "factory zero2"."""
    logging.disable(logging.INFO)
    from transformers import Trainer, TrainingArguments

    from amsf_dist.integrations.transformers import AMSFFactory, AveragedWeights

    callbacks = changes.pop("callbacks", [AveragedWeights()])
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // 2 // dist.get_world_size(),
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": len(held_out()) // dist.get_world_size(),
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps",
        "save_steps": SAVE,
        "eval_steps": SAVE,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "report_to": [],
        "disable_tqdm": True,
        "prediction_loss_only": True,
        **_wrapping(kind),
        **changes,
    }
    named = kind.startswith("zero")
    factory = None if named else (AMSFFactory, dict(OPTIONS))
    if named:
        settings.update(learning_rate=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
        settings.update(adam_beta2=0.99)
    return Trainer(
        llama(seed),
        TrainingArguments(**settings),
        train_dataset=sequences(),
        eval_dataset=held_out(),
        optimizer_cls_and_kwargs=factory,
        callbacks=callbacks,
    )


def _wrapping(kind: str) -> dict[str, Any]:
    """Arguments of the Trainer; and what accelerate must be told to do the same on CPUs."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size)
    os.environ.update(LOCAL_WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    ready = {"accelerator_config": {"use_configured_state": True}}
    if kind.startswith("fsdp2"):
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.MULTI_GPU  # on a CPU it would leave FSDP out
        full = "FULL_STATE_DICT" if kind == "fsdp2 full" else "SHARDED_STATE_DICT"
        return {**ready, "fsdp": True, "fsdp_config": {"state_dict_type": full}}
    if "zero" in kind:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        settings = deepspeed_json(int(kind[-1]))
        if "factory" in kind:
            del settings["optimizer"]
        return {**ready, "deepspeed": settings}
    return {"use_cpu": True}
