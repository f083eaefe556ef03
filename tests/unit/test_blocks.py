"""Block rules by name and shape alone: geometry, rule lists, and what bad input gets."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amsf_dist.architecture import Facts
from amsf_dist.blocks import (
    KINDS,
    Blocks,
    canonical_name,
    check,
    resolve,
    unmatched_patterns,
)
from amsf_dist.names import ROLES, role_of

Q = "model.layers.0.self_attn.q_proj.weight"


def blocks_of(rule, name, shape, **kwargs) -> tuple[str, int]:
    blocks = resolve(rule, name, shape, **kwargs)
    return blocks.kind, blocks.num_blocks(shape)


# ---------------------------------------------------------------------------------- geometry


NAMES = [None, Q, "lm_head.weight", "h.0.attn.c_attn.weight", "a.norm.weight", "a.bias", "moe", "x"]


@settings(deadline=None)  # busy machines are not slow code
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(NAMES),
    shape=st.lists(st.integers(0, 6), max_size=5),
    role=st.sampled_from((None, *ROLES)),
    head_dim=st.sampled_from((None, 2, 3)),
    data=st.data(),
)
def test_blocks_are_equal_runs_of_every_shape(kind, name, shape, role, head_dim, data):
    facts = None
    if role is not None:
        order = data.draw(st.sampled_from((None, tuple(reversed(range(len(shape)))))))
        facts = Facts(role, head_dim=head_dim, order=order)
    try:
        blocks = resolve(kind, name, shape, facts=facts)
    except ValueError:
        assert kind == "adam_mini"  # the only one that may refuse
        return
    numel = math.prod(shape)
    assert blocks.block_numel >= 1 and numel % blocks.block_numel == 0
    assert blocks.num_blocks(shape) * blocks.block_numel == numel
    assert blocks.order is None or sorted(blocks.order) == list(range(len(shape)))
    if kind == "auto":
        assert blocks.kind != "tensor"


@pytest.mark.parametrize(
    ("kind", "shape", "block_numel"),
    [
        ("row", (7, 5), 5),
        ("row", (1, 5), 5),
        ("row", (5, 1), 1),
        ("row", (5,), 1),
        ("row", (), 1),
        ("row", (0, 5), 1),
        ("row", (5, 0), 1),
        ("row", (2, 3, 4), 4),
        ("row", (8, 3, 2, 2), 12),
        ("tensor", (7, 5), 35),
        ("tensor", (), 1),
        ("tensor", (0, 5), 1),
        ("element", (7, 5), 1),
    ],
)
def test_one_kind_for_all_parameters(kind, shape, block_numel):
    assert resolve(kind, "anything.weight", shape).block_numel == block_numel
    assert resolve(kind, None, shape).block_numel == block_numel


def test_rows_follow_the_stored_order():
    conv1d = Facts("linear", order=(1, 0))
    assert resolve("row", "w", (3, 8), facts=conv1d) == Blocks("row", 3, (1, 0))
    experts = Facts("experts", order=(0, 2, 1))
    assert resolve("auto", "w", (2, 5, 7), facts=experts) == Blocks("row", 5, (0, 2, 1))
    # ConvTranspose2d(6, 4, 3, groups=2) stores [6, 2, 3, 3]; an output channel sees 3 inputs.
    transposed = Facts("convolution", order=(1, 0, 2, 3), groups=2)
    assert resolve("row", "w", (6, 2, 3, 3), facts=transposed).block_numel == 3 * 9


def test_unknown_3d_weights_have_rows_along_the_last_dim_unless_they_are_convolutions():
    assert blocks_of("auto", "stack.weight", (3, 4, 5)) == ("row", 12)
    assert blocks_of("auto", "stem.conv1.weight", (3, 4, 5)) == ("row", 3)
    assert blocks_of("auto", "stem.weight", (3, 4, 5, 5)) == ("row", 3)
    assert blocks_of("auto", "stem.weight", (1, 4, 5, 6)) == ("row", 20)
    assert blocks_of("auto", "stem.conv.weight", (1, 4, 5, 6)) == ("row", 1)
    assert blocks_of("auto", "embeddings.position_embeddings", (1, 17, 64)) == ("row", 17)


# ------------------------------------------------------------------------------ names alone


QUERY_KEY_NAMES = """
    layers.0.self_attn.q_proj.weight layers.0.self_attn.k_proj.weight layers.0.attention.wq.weight
    layers.0.attention.wk.weight encoder.layer.0.attention.self.query.weight
    encoder.layer.0.attention.self.key.weight layers.0.self_attn.q_b_proj.weight
    attn1.to_q.weight
    attn1.to_k.weight
    decoder.block.0.layer.1.EncDecAttention.q.weight block.0.SelfAttention.k.weight
    self_attn.q_proj_weight blocks.0.sa.heads.0.key.weight q_proj.base_layer.weight
    self_attn.q_proj.linear.weight self_attn.q_proj.parametrizations.weight.original
""".split()
NOT_QUERY_KEY_NAMES = """
    monkey.weight keyboard.query_embed.weight mlp.norm.weight blocks.0.feed_forward.key.weight
    layers.0.q.weight mlp.k.weight layers.0.self_attn.v_proj.weight layers.0.self_attn.o_proj.weight
    projector.query layers.0.self_attn.q_proj.lora_A.default.weight layers.0.self_attn.q_norm.weight
    layers.0.self_attn.q_a_proj.weight layers.0.self_attn.kv_b_proj.weight mixer.in_proj.weight
""".split()
FUSED_NAMES = """
    layers.0.self_attn.qkv_proj.weight layers.0.attention.query_key_value.weight attn.Wqkv.weight
    self_attn.in_proj_weight blocks.0.attn.qkv.weight
""".split()


@pytest.mark.parametrize("name", QUERY_KEY_NAMES)
def test_queries_and_keys_are_known_by_whole_path_parts(name):
    assert role_of(name, 2) == "query_key"
    assert blocks_of("auto", name, (64, 32), head_dim=16) == ("head", 4)


@pytest.mark.parametrize("name", NOT_QUERY_KEY_NAMES)
def test_substrings_are_not_queries_or_keys(name):
    assert role_of(name, 2) not in ("query_key", "fused_qkv")


@pytest.mark.parametrize("name", FUSED_NAMES)
def test_fused_projections_are_cut_in_heads_throughout(name):
    assert blocks_of("auto", name, (96, 32), head_dim=16) == ("head", 6)
    assert blocks_of("adam_mini", name, (96, 32), head_dim=16) == ("head", 6)


def test_heads_of_unknown_size_fall_to_rows_and_say_so():
    blocks = resolve("auto", Q, (64, 32))
    assert (blocks.kind, blocks.block_numel) == ("row", 32)
    assert blocks.note == "head_dim is not known: one row per block"
    blocks = resolve("auto", Q, (64, 32), facts=Facts("query_key", head_dim=48))
    assert blocks.kind == "row"
    assert "head_dim 48, read from the model, does not divide its 64 rows" in blocks.note


def test_given_head_dim_wins_over_the_facts():
    facts = Facts("query_key", head_dim=32)
    assert blocks_of("auto", Q, (64, 32), facts=facts) == ("head", 2)
    assert blocks_of("auto", Q, (64, 32), facts=facts, head_dim=16) == ("head", 4)


def test_vectors_are_elements_under_auto_and_norms_one_block_under_adam_mini():
    for name in ("layers.0.input_layernorm.weight", "ln_f.weight", "bn1.weight", "norm.weight"):
        assert blocks_of("auto", name, (8,)) == ("element", 8)
        assert blocks_of("adam_mini", name, (8,)) == ("tensor", 1)
    for name in ("fc.bias", "ln_f.bias", "layers.0.self_attn.q_proj.bias", "rnn.bias_ih_l0"):
        assert blocks_of("auto", name, (8,)) == ("element", 8)
        assert blocks_of("adam_mini", name, (8,)) == ("element", 8)
    assert blocks_of("auto", "logit_scale", ()) == ("element", 1)
    sinks = resolve("adam_mini", "layers.0.self_attn.sinks", (8,))
    assert sinks.kind == "tensor" and sinks.note.startswith("not recognised")


def test_biases_with_two_dims_are_elements():
    for name in ("experts.gate_up_proj_bias", "attn.relative_position_bias_table", "mha.bias_k"):
        assert blocks_of("auto", name, (4, 6)) == ("element", 24)


def test_what_is_not_recognised_is_one_row_per_block_and_says_so():
    for kind in ("auto", "adam_mini"):
        blocks = resolve(kind, "strange.thing", (4, 6))
        assert (blocks.kind, blocks.block_numel) == ("row", 6)
        assert blocks.note.startswith("not recognised: ")
    assert resolve("auto", None, (4, 6)).note.startswith("not recognised: no name")
    assert resolve("auto", "layers.0.mlp.up_proj.weight", (4, 6)).note == ""


def test_names_that_may_be_transposed_are_rows_with_a_note():
    for name, shape in {
        "transformer.h.0.attn.c_attn.weight": (32, 96),
        "transformer.h.0.attn.c_proj.weight": (32, 32),
        "transformer.h.0.mlp.c_fc.weight": (32, 128),
    }.items():
        blocks = resolve("auto", name, shape, head_dim=8)
        assert blocks.kind == "row" and "Conv1D" in blocks.note
    # nanoGPT's nn.Linear of that name is taller than wide, which Conv1D's never is.
    assert blocks_of("auto", "transformer.h.0.attn.c_attn.weight", (96, 32), head_dim=8) == (
        "head",
        12,
    )
    blocks = resolve("auto", "layers.0.mlp.experts.down_proj", (4, 8, 6))
    assert blocks.block_numel == 6 and "pass the model" in blocks.note


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("module.layers.0.weight", "layers.0.weight"),
        ("module._orig_mod.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module.layers.0.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.mlp.weight", "h.0.mlp.weight"),
        ("h.0._checkpoint_wrapped_module.mlp.weight", "h.0.mlp.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names_lose_their_wrappers(wrapped, bare):
    assert canonical_name(wrapped) == bare
    assert canonical_name(bare) == bare


# ------------------------------------------------------------------------------------ rules


RULES = [
    {"pattern": r"\.0\.self_attn\.(q|k)_proj\.weight$", "kind": "head", "head_dim": 8},
    {"pattern": r"self_attn", "kind": "row"},
    {"pattern": r"^lm_head", "kind": "tensor"},
    {"pattern": r"norm", "kind": "element"},
]


def test_the_first_rule_that_matches_wins_and_the_rest_follow_auto():
    assert blocks_of(RULES, Q, (32, 16), head_dim=16) == ("head", 4)
    assert blocks_of(RULES, Q.replace("0", "1"), (32, 16), head_dim=16) == ("row", 32)
    assert blocks_of(RULES, "module.lm_head.weight", (32, 16)) == ("tensor", 1)
    assert blocks_of(RULES, "layers.0.mlp.up_proj.weight", (32, 16)) == ("row", 32)
    assert blocks_of(RULES, "layers.0.cross_attn.q_proj.weight", (32, 16), head_dim=16) == (
        "head",
        2,
    )
    assert blocks_of([], Q, (32, 16), head_dim=16) == ("head", 2)


def test_a_head_rule_takes_rows_per_head_from_wherever_they_are_known():
    rule = [{"pattern": "wx", "kind": "head"}]
    assert blocks_of(rule, "wx", (32, 16), head_dim=16) == ("head", 2)
    assert blocks_of(rule, "wx", (32, 16), facts=Facts("query_key", head_dim=4)) == ("head", 8)
    with pytest.raises(ValueError, match="kind 'head' needs rows per head for parameter 'wx'"):
        resolve(rule, "wx", (32, 16))


def test_a_rule_may_hand_over_to_auto_or_adam_mini():
    rules = [{"pattern": "vision", "kind": "adam_mini", "head_dim": 4}]
    assert blocks_of(rules, "vision.norm.weight", (8,)) == ("tensor", 1)
    assert blocks_of(rules, "vision.self_attn.q_proj.weight", (8, 6)) == ("head", 2)


def test_rules_are_plain_data_and_detached():
    rules = json.loads(json.dumps(RULES))
    checked = check(tuple(rules))
    assert checked == RULES and json.loads(json.dumps(checked)) == RULES
    rules[0]["kind"] = "tensor"
    assert checked[0]["kind"] == "head"
    assert check([{"pattern": "a", "kind": "row", "head_dim": None}]) == [
        {"pattern": "a", "kind": "row"}
    ]
    assert check("auto") == "auto"


def test_patterns_that_match_nothing_are_listed():
    names = ["module.layers.0.self_attn.q_proj.weight", "norm.weight"]
    assert unmatched_patterns(RULES, names) == ["^lm_head"]
    assert unmatched_patterns("auto", names) == []
