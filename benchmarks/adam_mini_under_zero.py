"""Adam-mini and AMSF through DeepSpeed, stage by stage: python benchmarks/adam_mini_under_zero.py

Two processes on the CPU train a small Llama for ten steps with upstream's Adam_mini, with AMSF
as Adam-mini (averaging="ema") and with AMSF; printed is the loss of the last step, or what was
raised. Needs deepspeed, adam-mini and transformers.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS, STAGES = 10, (0, 1, 2, 3)
COMMON = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**heads, **size))


def settings(stage: int, optimizer: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        **({"optimizer": optimizer} if optimizer else {"zero_allow_untested_optimizer": True}),
    }


def train(which: str, stage: int, rank: int) -> str:
    import deepspeed
    from adam_mini import Adam_mini

    import amsf_dist  # noqa: F401  (the name)

    model, given = llama(), {}
    named = None
    if which == "adam-mini 1.1.1":
        given["optimizer"] = Adam_mini(
            model.named_parameters(), dim=48, n_heads=4, n_kv_heads=2, **COMMON
        )
    else:
        averaging = "ema" if "ema" in which else "schedule_free"
        blocks = {"blocks": "adam_mini", "averaging": averaging, "decay": "matrices"}
        named = {"type": "AMSF", "params": {**COMMON, **blocks}}
    try:
        engine = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=settings(stage, named), **given
        )[0]
        generator = torch.Generator().manual_seed(rank)
        start = torch.randint(0, 64, (8, 1), generator=generator)
        tokens = (start + torch.arange(17)) % 64  # counting can be learnt
        for _ in range(STEPS):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        return f"{float(loss.detach()):.4f}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"


def work(rank: int, port: int, which: str, stage: int, out: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    dist.init_process_group("gloo", rank=rank, world_size=2)
    told = train(which, stage, rank)
    if rank == 0:
        with open(out, "w") as file:
            file.write(told)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    optimizers = ("adam-mini 1.1.1", "AMSF, averaging=ema", "AMSF")
    print("| ZeRO stage | " + " | ".join(optimizers) + " |")
    print("|---" * (len(optimizers) + 1) + "|")
    for stage in STAGES:
        cells = []
        for which in optimizers:
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/told"
                mp.start_processes(
                    work, (free_port(), which, stage, out), nprocs=2, start_method="spawn"
                )
                cells.append(open(out).read() if os.path.exists(out) else "no answer")  # noqa: SIM115
        print(f"| {stage} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
