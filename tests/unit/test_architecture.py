"""Facts read from modules: every parameter of the architectures people train, on meta."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from architectures import CASES, GPT2, GQA, build, hf, resolve_all, summary
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from amsf_dist.architecture import Facts, read_architecture


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_a_known_architecture(name):
    expected = CASES[name][1]
    used = set()
    for param, shape, blocks in resolve_all(build(name)):
        found = f"{blocks.kind} {blocks.num_blocks(shape)}"
        assert blocks.note == "", f"{param}: {blocks.note}"
        if len(shape) < 2:
            assert found == f"element {shape[0]}", param
            continue
        (key,) = (key for key in expected if re.search(key, param))
        assert found == expected[key], (param, shape)
        used.add(key)
    assert used == set(expected)


def test_transposed_weights_have_their_outputs_first():
    facts = read_architecture(build("GPT2"))
    assert facts["transformer.h.0.attn.c_attn.weight"] == Facts("fused_qkv", 16, (1, 0))
    assert facts["transformer.h.0.mlp.c_fc.weight"].order == (1, 0)
    assert facts["lm_head.weight"].order is None
    for name in ("GptOss", "Llama4Text"):
        orders = [f.order for f in read_architecture(build(name)).values() if f.role == "experts"]
        assert orders == [(0, 2, 1)] * 2
    for name in ("Mixtral", "Qwen3Moe", "DeepseekV3"):
        orders = [f.order for f in read_architecture(build(name)).values() if f.role == "experts"]
        assert orders == [None] * 2


# ------------------------------------------------------------------------------ torch modules


def test_torch_attention_is_cut_in_heads():
    layer = nn.TransformerEncoderLayer(64, 4, 96, device="meta")
    found = summary(layer)
    assert found["self_attn.in_proj_weight"] == "head 12"
    assert found["self_attn.in_proj_bias"] == "element 192"
    assert found["self_attn.out_proj.weight"] == "row 64"
    assert found["linear1.weight"] == "row 96"
    separate = summary(nn.MultiheadAttention(64, 4, kdim=24, vdim=40, device="meta"))
    assert separate["q_proj_weight"] == separate["k_proj_weight"] == "head 4"
    assert separate["v_proj_weight"] == "row 64"
    biased = summary(nn.MultiheadAttention(64, 4, add_bias_kv=True, device="meta"))
    assert biased["bias_k"] == "element 64"


def test_torch_modules_have_one_block_per_output():
    modules = {
        nn.Conv1d(6, 8, 3): "row 8",
        nn.Conv2d(6, 8, 3, groups=2): "row 8",
        nn.Conv3d(6, 8, 3): "row 8",
        nn.Conv2d(8, 8, 3, groups=8): "row 8",
        nn.ConvTranspose1d(6, 8, 3): "row 8",
        nn.ConvTranspose2d(6, 8, 3, groups=2): "row 8",
        nn.Bilinear(3, 5, 7): "row 7",
        nn.Embedding(9, 4): "row 9",
        nn.EmbeddingBag(9, 4): "row 9",
        nn.Linear(5, 7): "row 7",
        nn.LayerNorm((3, 4)): "element 12",
        nn.GroupNorm(2, 4): "element 4",
        nn.BatchNorm2d(4): "element 4",
    }
    for module, expected in modules.items():
        assert summary(module)["weight"] == expected, module
    assert summary(nn.LayerNorm((3, 4)), "adam_mini")["weight"] == "tensor 1"
    gru = summary(nn.GRU(5, 7, num_layers=2, bidirectional=True))
    assert gru["weight_ih_l0"] == gru["weight_hh_l1_reverse"] == "row 21"
    assert summary(nn.LSTM(5, 8, proj_size=3))["weight_hr_l0"] == "row 3"
    assert summary(nn.GRUCell(5, 7))["weight_ih"] == "row 21"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_one_block_per_output_channel(groups):
    conv = nn.ConvTranspose1d(6, 8, 3, groups=groups, bias=False)
    ((_, shape, blocks),) = resolve_all(conv)
    (weight,) = conv.parameters()
    line = torch.arange(weight.numel()).reshape(shape).permute(blocks.order).reshape(-1)
    block_of = torch.empty(weight.numel(), dtype=torch.long)
    block_of[line] = torch.arange(weight.numel()) // blocks.block_numel
    # The gradient of one output channel reaches exactly the elements of one block.
    for channel in range(8):
        (grad,) = torch.autograd.grad(conv(torch.ones(1, 6, 4))[0, channel].sum(), weight)
        assert len(block_of[grad.reshape(-1) != 0].unique()) == 1
        assert (grad != 0).sum() == blocks.block_numel


def test_modules_are_surer_than_names():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.Linear(4, 6)
            self.monkey = nn.Linear(4, 6)
            self.pair_bias = nn.Linear(4, 6)
            self.query = nn.Parameter(torch.zeros(3, 4))
            self.strange = nn.Parameter(torch.zeros(3, 4))
            self.shift = nn.Parameter(torch.zeros(1, 2, 3, 4))

    model = Odd()
    found = summary(model)
    for name in ("norm1", "monkey", "pair_bias"):
        assert found[f"{name}.weight"] == "row 6"
    assert found["query"] == "row 3"
    assert found["shift"] == "row 6"
    notes = {name for name, _, blocks in resolve_all(model) if blocks.note}
    assert notes == {"strange", "shift"}


@pytest.mark.parametrize(
    ("attributes", "q_rows", "kv_rows", "expected"),
    [
        ({"head_dim": 8}, 32, 16, ("head 4", "head 2")),
        ({"n_heads": 4}, 32, 32, ("head 4", "head 4")),
        ({"n_heads": 4, "n_kv_heads": 2}, 32, 16, ("head 4", "head 2")),
        ({"n_head": 4, "n_embd": 32}, 32, 32, ("head 4", "head 4")),
        ({"head_dim": 5}, 32, 16, ("row 32", "row 16")),
        ({"head_dim": None, "n_heads": True}, 32, 16, ("row 32", "row 16")),
        ({}, 32, 16, ("row 32", "row 16")),
    ],
)
def test_rows_per_head_come_from_the_attributes_around(attributes, q_rows, kv_rows, expected):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq = nn.Linear(32, q_rows)
            self.wk = nn.Linear(32, kv_rows)

    model = nn.ModuleDict({"attention": Attention()})
    for name, value in attributes.items():
        setattr(model["attention"], name, value)
    found = summary(model)
    assert (found["attention.wq.weight"], found["attention.wk.weight"]) == expected
    assert summary(model, head_dim=16)["attention.wq.weight"] == "head 2"


def test_a_configuration_that_raises_says_nothing():
    class Config:
        num_attention_heads = 4

        @property
        def head_dim(self) -> int:
            raise RuntimeError("varies by layer")

    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    model.config = Config()
    assert summary(model)["q_proj.weight"] == "head 4"


def test_tied_weights_stand_under_every_name_with_the_same_facts():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    facts = read_architecture(model)
    assert facts["lm_head.weight"] == facts["model.embed_tokens.weight"] == Facts("embedding")


def test_weight_norm_and_lazy_modules():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)))
    found = summary(model)
    assert found["0.parametrizations.weight.original1"] == "row 6"
    attention = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.orthogonal(attention, "in_proj_weight")
    found = summary(attention)
    assert found["parametrizations.in_proj_weight.original"] == "head 6"
    assert found["out_proj.weight"] == "row 8"
    assert read_architecture(nn.LazyLinear(3)) == {}


# ---------------------------------------------------------------------------------- wrappers


@pytest.fixture
def three_ranks():
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": 2}))


def test_wrappers_change_nothing(three_ranks):
    bare = read_architecture(gpt2())
    ddp = nn.parallel.DistributedDataParallel
    assert read_architecture(ddp(gpt2())) == bare
    assert read_architecture(torch.compile(gpt2())) == bare
    assert read_architecture(torch.compile(ddp(gpt2()))) == bare
    checkpointed = gpt2()
    checkpointed.transformer.h[0] = checkpoint_wrapper(checkpointed.transformer.h[0])
    assert read_architecture(checkpointed) == bare


def test_fsdp2_changes_nothing(three_ranks):
    model, mesh = gpt2(), dist.init_device_mesh("cpu", (3,))
    for block in model.transformer.h:
        fully_shard(block.mlp.c_fc, mesh=mesh)
        fully_shard(block, mesh=mesh)
    assert type(block.mlp.c_fc).__name__ == "FSDPConv1D"
    fully_shard(model, mesh=mesh)
    assert read_architecture(model) == read_architecture(gpt2())
    assert summary(model) == summary(gpt2())


def test_zero3_shapes_are_read_beside_the_empty_parameters():
    model = gpt2()
    for param in model.parameters():  # what deepspeed.zero.Init leaves behind
        param.ds_shape = param.shape
        param.data = torch.empty(0)
    assert read_architecture(model) == read_architecture(gpt2())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_changes_nothing(three_ranks, use_orig_params):
    def wrap(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    model = gpt2()
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = wrap(checkpoint_wrapper(block))
    facts = read_architecture(wrap(model))
    bare = read_architecture(gpt2())
    assert {name: facts[name] for name in bare} == bare
    assert all("_flat_param" in name for name in facts.keys() - bare.keys())
