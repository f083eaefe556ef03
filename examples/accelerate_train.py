"""A complete script for accelerate, under every file of configs/accelerate but the offloaded one.

launch/accelerate.sh configs/accelerate/fsdp2.yaml examples/accelerate_train.py
torchrun --nproc-per-node 8 examples/accelerate_train.py        # DDP, without a file
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from amsf_dist import AMSF

VOCAB, LENGTH = 64, 32


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Counting in steps of 1 to 4: something that a small model learns in a minute."""
    made = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCAB, (count, 1), generator=made)
    strides = torch.randint(1, 5, (count, 1), generator=made)
    tokens = (starts + strides * torch.arange(LENGTH)) % VOCAB
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per process and step")
    parser.add_argument("--output", help="folder for the model at x")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    accelerator = Accelerator()
    model = LlamaForCausalLM(config)
    optimizer = AMSF(model, lr=1e-2, warmup_steps=args.steps // 5, weight_decay=0.1)
    count = args.steps * args.batch_size * accelerator.num_processes
    model, optimizer, train, held_out = accelerator.prepare(
        model,
        optimizer,
        DataLoader(sequences(count, seed=1), batch_size=args.batch_size),
        DataLoader(sequences(64, seed=2), batch_size=8),
    )
    for batch in train:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    optimizer.eval()  # the average x: every rank
    with torch.no_grad():
        losses = [accelerator.gather(model(**batch).loss.detach()[None]) for batch in held_out]
    loss = float(torch.cat(losses).mean())
    if args.output:
        accelerator.unwrap_model(model).save_pretrained(
            args.output,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
    kind, count = accelerator.distributed_type.value, accelerator.num_processes
    accelerator.print(f"{count} processes ({kind}), held-out loss {loss:.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
