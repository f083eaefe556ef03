"""`explain` on paper: what a mesh would cut, without starting a process."""

from __future__ import annotations

import pytest
import torch
from models import Transformer

from amsf_dist import AMSF, explain


@pytest.fixture(scope="module")
def llama_3_8b() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("mesh", "blocks", "cut"),
    [
        (8, "adam_mini", 65),  # the norms, one block each; four query heads on every rank
        (64, "adam_mini", 65 + 32 * (32 + 8)),  # and all heads
        (1024, "adam_mini", 1345),
        ((2, 8), "adam_mini", 65),  # replicas cut nothing
        (8, "auto", 0),
        (64, "auto", 1280),
        (64, "row", 0),
        # columns and the mean: of 6 matrices with 4,096 columns and of one with 14,336 per layer
        (64, "factored", 32 * (6 * 4097 + 14337) + 2 * 4097),
    ],
)
def test_llama_3_8b_on_a_mesh_that_is_not_there(
    llama_3_8b: torch.nn.Module, mesh: object, blocks: str, cut: int
) -> None:
    table = explain(llama_3_8b, mesh=mesh, blocks=blocks)  # type: ignore[arg-type]
    assert table.cut_blocks == cut
    if blocks == "adam_mini":
        assert sum(row.blocks for row in table.rows) == 1_470_273
    assert not table.not_recognised


def test_the_table_of_a_model_and_of_its_optimizer_are_one() -> None:
    model = Transformer(dtype=torch.float32)
    assert explain(model, state_storage="bf16") == AMSF(model, state_storage="bf16").explain()
    text = str(explain(model))
    assert "model.layers.0.self_attn.q_proj.weight" in text and "head" in text


def test_state_bytes_are_those_of_the_state() -> None:
    optimizer = AMSF(Transformer(dtype=torch.float32))
    memory = optimizer.memory()
    rows = optimizer.explain().rows
    assert sum(row.state_bytes for row in rows) == memory["gap"] + memory["v"]
