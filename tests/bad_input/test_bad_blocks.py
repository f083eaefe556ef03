"""What a wrong `blocks=` or `head_dim=` gets: one line with value, allowed words and cure."""

from __future__ import annotations

import re

import pytest

from amsf_dist.architecture import Facts
from amsf_dist.blocks import check, resolve

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("rows", ValueError, "blocks must be one of 'auto', .*, got 'rows'; did you mean 'row'?"),
        ("Auto", ValueError, "did you mean 'auto'?"),
        ("head", ValueError, "blocks='head' fits some parameters only; use 'auto', or a rule"),
        ("factorised", ValueError, "did you mean 'factored'?"),
        (None, TypeError, "blocks must be one of .* or a list of rules, got None"),
        (3, TypeError, "or a list of rules, got 3"),
        ({"pattern": "a", "kind": "row"}, TypeError, "or a list of rules"),
        (["row"], TypeError, r"blocks\[0\] must be a rule such as .*, got 'row'"),
        ([{"kind": "row"}], ValueError, r"blocks\[0\] lacks 'pattern'"),
        ([{"pattern": "a"}], ValueError, r"blocks\[0\] lacks 'kind'"),
        (
            [{"pattern": "a", "kind": "row", "headdim": 3}],
            ValueError,
            r"blocks\[0\] has the unknown key 'headdim'.*did you mean 'head_dim'\?",
        ),
        ([{"pattern": "(a", "kind": "row"}], ValueError, r"is not a regular expression: '\(a'"),
        ([{"pattern": "", "kind": "row"}], ValueError, "empty; use '.*'"),
        ([{"pattern": 3, "kind": "row"}], TypeError, "must be a regular expression, got 3"),
        (
            [{"pattern": "a", "kind": "heads"}],
            ValueError,
            r"blocks\[0\]\['kind'\] must be one of .*, got 'heads'; did you mean 'head'\?",
        ),
        ([{"pattern": "a", "kind": None}], TypeError, "must be one of"),
        ([{"pattern": "a", "kind": "head", "head_dim": 0}], ValueError, "must be >= 1"),
        ([{"pattern": "a", "kind": "head", "head_dim": "64"}], TypeError, "whole number"),
        ([{"pattern": "a", "kind": "row", "head_dim": 64}], ValueError, "does not use"),
    ],
)
def test_bad_blocks_arguments_are_refused_in_one_line(blocks, error, message):
    with pytest.raises(error, match=message) as caught:
        check(blocks)
    assert "\n" not in str(caught.value)
    with pytest.raises(error):
        resolve(blocks, "a", (4, 4))


def test_a_given_head_dim_that_does_not_divide_is_refused():
    message = r"head_dim=48 does not divide the 64 rows of parameter '.*q_proj.weight' of shape \("
    for kind in ("auto", "adam_mini"):
        with pytest.raises(ValueError, match=message) as caught:
            resolve(kind, Q, (64, 32), head_dim=48)
    # The cure in the message works as it stands.
    pattern = re.search(r"'pattern': '(.*?)', 'kind'", str(caught.value)).group(1)
    pattern = pattern.replace("\\\\", "\\")
    assert resolve([{"pattern": pattern, "kind": "row"}], Q, (64, 32), head_dim=48).kind == "row"
    with pytest.raises(ValueError, match="head_dim must be >= 1"):
        resolve("auto", Q, (64, 32), head_dim=0)
    with pytest.raises(TypeError, match="head_dim must be a whole number"):
        resolve("auto", Q, (64, 32), head_dim=True)


def test_adam_mini_needs_heads_and_names():
    with pytest.raises(ValueError, match=r"q_proj.*head_dim is not known; pass head_dim="):
        resolve("adam_mini", Q, (64, 32))
    with pytest.raises(ValueError, match="does not divide its 64 rows; pass head_dim="):
        resolve("adam_mini", Q, (64, 32), facts=Facts("query_key", head_dim=48))
    with pytest.raises(ValueError, match=r"has none; pass model.named_parameters\(\) or the model"):
        resolve("adam_mini", None, (64, 32))
    assert resolve("adam_mini", None, (64,)).kind == "element"


def test_rules_by_name_need_a_name():
    with pytest.raises(ValueError, match="has no name; pass model.named_parameters"):
        resolve([{"pattern": "q_proj", "kind": "row"}], None, (64, 32))
