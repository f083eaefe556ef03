"""Tokens per second of training, optimizers side by side under FSDP2 and DeepSpeed's ZeRO.

    torchrun --nproc-per-node 2 benchmarks/throughput.py [--engines fsdp2 zero2] [--out FILE.md]

One model, one batch, real forward and backward passes. The optimizers take turns, some steps each,
round after round, so that what else the machine does hits all alike; the table gives the median
over the rounds and the ratio to AdamW under the same engine. On a CPU the model's arithmetic takes
nearly all of the time; on GPUs the optimizer's share grows with parameters over tokens.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from step_time import machine
from torch import nn
from torch.distributed.fsdp import fully_shard

from amsf_dist import AMSF, cast_model, enable_gradient_release

Step = Callable[[torch.Tensor], None]
LR = 1e-4
SMALL = {"state_storage": "int8", "weight_storage": "bf16+8"}


def llama(options: argparse.Namespace) -> Any:
    """A Llama with weights from one seed."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        vocab_size=options.vocab,
    )
    return transformers.LlamaForCausalLM(config)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fastest."""
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def schedulefree(model: nn.Module) -> torch.optim.Optimizer:
    """The published Schedule-Free AdamW."""
    from schedulefree import AdamWScheduleFree

    optimizer: torch.optim.Optimizer = AdamWScheduleFree(model.parameters(), lr=LR)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def under_fsdp2(
    options: argparse.Namespace,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    half: bool = False,
    release: bool = False,
) -> Step:
    """A step under `fully_shard`, every layer a unit."""
    model = llama(options)
    if half:
        cast_model(model, torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = build(model)
    if release:
        assert isinstance(optimizer, AMSF)
        enable_gradient_release(model, optimizer, clip="block")

    def step(tokens: torch.Tensor) -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def under_zero(options: argparse.Namespace, stage: int, optimizer: dict[str, Any]) -> Step:
    """A step of a DeepSpeed engine."""
    import deepspeed

    model = llama(options)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": options.batch,
            "optimizer": optimizer,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )

    def step(tokens: torch.Tensor) -> None:
        engine.backward(loss_of(engine, tokens))
        engine.step()

    return step


def peers(options: argparse.Namespace, engine: str) -> dict[str, Callable[[], Step]]:
    """Name -> a function that builds model and optimizer and gives a step; AdamW first."""
    if engine == "fsdp2":
        return {
            "AdamW(fused)": lambda: under_fsdp2(options, adamw),
            "schedulefree AdamW": lambda: under_fsdp2(options, schedulefree),
            "AMSF fp32": lambda: under_fsdp2(options, lambda m: AMSF(m, lr=LR)),
            "AMSF fp32, gradient release": lambda: under_fsdp2(
                options, lambda m: AMSF(m, lr=LR), release=True
            ),
            "AdamW(fused), bf16 weights": lambda: under_fsdp2(options, adamw, half=True),
            "AMSF 4.06 bytes": lambda: under_fsdp2(
                options, lambda m: AMSF(m, lr=LR, **SMALL), half=True
            ),
        }
    stage = int(engine.removeprefix("zero"))
    torch_adam = {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}}
    return {
        "AdamW (torch_adam)": lambda: under_zero(options, stage, torch_adam),
        "AMSF fp32": lambda: under_zero(
            options, stage, {"type": "AMSF", "params": {"lr": LR, "head_dim": 64}}
        ),
    }


def measure(options: argparse.Namespace, engine: str, device: torch.device) -> dict[str, Any]:
    """Tokens per second over all ranks, of every round."""
    shape = (options.batch, options.length + 1)
    tokens = torch.randint(options.vocab, shape, generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(device)
    steps = {name: build() for name, build in peers(options, engine).items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    count = options.batch * options.length * dist.get_world_size() * options.steps
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(options.steps):
                step(tokens)
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if number:  # the first warms up
                found[name].append(count / (time.perf_counter() - start))
    del steps
    gc.collect()
    return found


def table(engine: str, found: dict[str, list[float]]) -> str:
    """Markdown."""
    base = statistics.median(next(iter(found.values())))
    lines = [f"## {engine}", "", "| | tokens/s | to AdamW | rounds |", "|---|---|---|---|"]
    for name, rounds in found.items():
        ratios = sorted(number / base for number in rounds)
        spread = f"{ratios[0]:.2f} .. {ratios[-1]:.2f}"
        middle = statistics.median(rounds)
        lines.append(f"| {name} | {middle:,.0f} | {middle / base:.2f} | {spread} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every engine, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["fsdp2", "zero1", "zero2", "zero3"])
    for name, default in {
        "hidden": 512,
        "layers": 4,
        "vocab": 8192,
        "batch": 2,
        "length": 64,
        "steps": 2,
        "rounds": 6,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    numel = sum(param.numel() for param in llama(options).parameters())
    text = [
        f"# Tokens per second\n\n{dist.get_world_size()} ranks, {machine()}\n\n"
        f"A Llama of {numel / 1e6:.1f}M parameters, {options.batch} x {options.length} tokens a "
        f"rank and step; medians of {options.rounds} rounds of {options.steps} steps.\n"
    ]
    for engine in options.engines:
        text.append(table(engine, measure(options, engine, device)))
        if dist.get_rank() == 0:
            print(text[-1], flush=True)
    if dist.get_rank() == 0 and options.out is not None:
        options.out.write_text("\n".join(text))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
