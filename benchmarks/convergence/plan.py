"""The settings of the study, by set: what was tried to choose, and what is compared in the end."""

from __future__ import annotations

from benchmarks.convergence.setting import COARSE, Setting

__all__ = ["COMPARED", "IN_PICTURE", "REFERENCE", "SETS", "WHY", "settings_of"]

REFERENCE = "AdamW + cosine"
_BEGAN_ADAMW = Setting("", "adamw", {"lr": 2e-3, "betas": [0.9, 0.95], "warmup_steps": 150})
_BEGAN_AMSF = Setting(
    "",
    "amsf",
    {"lr": 3e-3, "betas": [0.95, 0.99], "r": 2.0, "warmup_steps": 150, "blocks": "auto"},
)

_LATER_AMSF = _BEGAN_AMSF.but("", betas=[0.9, 0.99], warmup_steps=300)

# As many trials for AdamW as for AMSF; each began from what earlier trials had favoured.
_TRY_ADAMW = [
    *(
        _BEGAN_ADAMW.but(f"AdamW, lr {lr:g}", COARSE, lr=lr)
        for lr in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)
    ),
    _BEGAN_ADAMW.but("AdamW, beta2 0.99", COARSE, betas=[0.9, 0.99]),
    _BEGAN_ADAMW.but("AdamW, no clipping", COARSE, clip=None),
    _BEGAN_ADAMW.but("AdamW, warm-up 300", COARSE, warmup_steps=300),
    *(
        _BEGAN_ADAMW.but(f"AdamW, warm-up 300, lr {lr:g}", COARSE, warmup_steps=300, lr=lr)
        for lr in (3e-3, 4e-3, 6e-3)
    ),
    _BEGAN_ADAMW.but("AdamW, warm-up 450, lr 0.004", COARSE, warmup_steps=450, lr=4e-3),
]
_TRY_AMSF = [
    *(_BEGAN_AMSF.but(f"AMSF, lr {lr:g}", COARSE, lr=lr) for lr in (2e-3, 3e-3, 4e-3, 6e-3)),
    _BEGAN_AMSF.but("AMSF, warm-up 300", COARSE, warmup_steps=300),
    _BEGAN_AMSF.but("AMSF, beta1 0.9", COARSE, betas=[0.9, 0.99]),
    _BEGAN_AMSF.but("AMSF, beta1 0.8", COARSE, betas=[0.8, 0.99]),
    _BEGAN_AMSF.but("AMSF, beta1 0.9, lr 0.004", COARSE, betas=[0.9, 0.99], lr=4e-3),
    *(
        _LATER_AMSF.but(f"AMSF, beta1 0.9, warm-up 300, lr {lr:g}", COARSE, lr=lr)
        for lr in (3e-3, 4e-3)
    ),
    _LATER_AMSF.but("AMSF, beta1 0.9, warm-up 300, factored", COARSE, blocks="factored"),
    _LATER_AMSF.but("AMSF, beta1 0.9, warm-up 450, lr 0.004", COARSE, lr=4e-3, warmup_steps=450),
    _LATER_AMSF.but("AMSF, beta1 0.9, warm-up 300, r 0", COARSE, r=0.0),
    _LATER_AMSF.but("AMSF, beta1 0.9, warm-up 300, no clipping", COARSE, clip=None),
]

# What was chosen.
_ADAMW = _BEGAN_ADAMW.but(REFERENCE, lr=4e-3, warmup_steps=450)
_AMSF = _LATER_AMSF.but("AMSF", lr=4e-3, warmup_steps=450)


def _rule(blocks: str) -> Setting:
    return _AMSF.but(f"AMSF fp32, blocks {blocks}", blocks=blocks)


def _low(name: str, weights: str, state: str) -> Setting:
    return _AMSF.but(name, weights="bf16", weight_storage=weights, state_storage=state)


_FP32 = [_rule(blocks) for blocks in ("auto", "element", "factored", "row", "adam_mini", "tensor")]
_LOW = [
    _low("AMSF 5.06: bf16+16, int8", "bf16+16", "int8"),
    _low("AMSF 5: bf16+8, bf16", "bf16+8", "bf16"),
    _low("AMSF 4.06: bf16+8, int8", "bf16+8", "int8"),
    _low("AMSF 3.06: stochastic, int8", "stochastic", "int8"),
]
COMPARED = [
    _ADAMW,
    Setting("Adam-mini + cosine", "adam_mini", _ADAMW.options),
    Setting(
        "AdamWScheduleFree",
        "adamw_schedule_free",
        {key: value for key, value in _AMSF.options.items() if key != "blocks"},
    ),
    *_FP32,
    *_LOW,
    Setting(
        "FlashAdamW (pytorch_optimizer) + cosine",
        "portable_flash_adamw",
        _ADAMW.options,
        weights="bf16",
    ),
    Setting("FlashAdamW + cosine", "flash_adamw", _ADAMW.options, weights="bf16"),
]

_COMPARED_BEFORE = [*_FP32[:4], *_LOW[2:]]
_AT_FIRST = [
    setting.but(f"{setting.name}, beta1 0.95", betas=[0.95, 0.99], lr=3e-3, warmup_steps=150)
    for setting in _COMPARED_BEFORE
]
_SHORT_WARM_UP = [
    setting.but(f"{setting.name}, warm-up 150", lr=3e-3, warmup_steps=150)
    for setting in _COMPARED_BEFORE
]

SETS: dict[str, list[Setting]] = {
    "try-adamw": _TRY_ADAMW,
    "try-amsf": _TRY_AMSF,
    "beta1-0.95": _AT_FIRST,
    "warm-up-150": _SHORT_WARM_UP,
    "final": COMPARED,
}
WHY = {
    "try-adamw": "AdamW under a cosine to zero, seed 0.",
    "try-amsf": "AMSF in fp32, seed 0, as many trials.",
    "beta1-0.95": "Block rules and bytes where the search began, before beta1 0.9 was tried.",
    "warm-up-150": "The same at beta1 0.9, before longer warm-ups were tried.",
}
IN_PICTURE = [
    REFERENCE,
    "Adam-mini + cosine",
    "AdamWScheduleFree",
    "AMSF fp32, blocks auto",
    "AMSF fp32, blocks factored",
    "AMSF 4.06: bf16+8, int8",
    "AMSF 3.06: stochastic, int8",
]


def settings_of(words: list[str]) -> list[Setting]:
    """Settings by the names of sets or by their own.

    Raises:
        KeyError: a word is neither.
    """
    by_name = {setting.name: setting for each in SETS.values() for setting in each}
    found = []
    for word in words:
        if word not in SETS and word not in by_name:
            raise KeyError(f"{word}: neither a set ({', '.join(SETS)}) nor a setting; see `list`")
        found += SETS.get(word) or [by_name[word]]
    return found
