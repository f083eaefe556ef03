"""The settings of the study, by set: what was tried to choose, and what is compared in the end."""

from __future__ import annotations

from benchmarks.convergence.setting import COARSE, Setting

__all__ = ["COMPARED", "IN_PICTURE", "REFERENCE", "SETS", "WHY", "settings_of"]

REFERENCE = "AdamW + cosine"
_ADAMW = Setting(REFERENCE, "adamw", {"lr": 2e-3, "betas": [0.9, 0.95], "warmup_steps": 150})
_AMSF = Setting(
    "AMSF",
    "amsf",
    {"lr": 3e-3, "betas": [0.95, 0.99], "r": 2.0, "warmup_steps": 150, "blocks": "auto"},
)

# As many trials for AdamW as for AMSF.
_TRY_ADAMW = [
    *(_ADAMW.but(f"AdamW, lr {lr:g}", COARSE, lr=lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)),
    _ADAMW.but("AdamW, beta2 0.99", COARSE, betas=[0.9, 0.99]),
    _ADAMW.but("AdamW, betas 0.95, 0.99", COARSE, betas=[0.95, 0.99]),
    _ADAMW.but("AdamW, warm-up 300", COARSE, warmup_steps=300),
    _ADAMW.but("AdamW, no clipping", COARSE, clip=None),
]
_TRY_AMSF = [
    *(_AMSF.but(f"AMSF, lr {lr:g}", COARSE, lr=lr) for lr in (2e-3, 3e-3, 4e-3, 6e-3)),
    _AMSF.but("AMSF, beta1 0.9", COARSE, betas=[0.9, 0.99]),
    _AMSF.but("AMSF, warm-up 300", COARSE, warmup_steps=300),
    _AMSF.but("AMSF, r 0", COARSE, r=0.0),
    _AMSF.but("AMSF, r 5", COARSE, r=5.0),
    _AMSF.but("AMSF, no clipping", COARSE, clip=None),
]


def _low(name: str, weights: str, state: str) -> Setting:
    return _AMSF.but(name, weights="bf16", weight_storage=weights, state_storage=state)


COMPARED = [
    _ADAMW,
    Setting("Adam-mini + cosine", "adam_mini", _ADAMW.options),
    Setting(
        "AdamWScheduleFree",
        "adamw_schedule_free",
        {key: value for key, value in _AMSF.options.items() if key != "blocks"},
    ),
    *(
        _AMSF.but(f"AMSF fp32, blocks {blocks}", blocks=blocks)
        for blocks in ("auto", "element", "factored", "row", "adam_mini", "tensor")
    ),
    _low("AMSF 5.06: bf16+16, int8", "bf16+16", "int8"),
    _low("AMSF 5: bf16+8, bf16", "bf16+8", "bf16"),
    _low("AMSF 4.06: bf16+8, int8", "bf16+8", "int8"),
    _low("AMSF 3.06: stochastic, int8", "stochastic", "int8"),
    Setting("FlashAdamW + cosine", "flash_adamw", _ADAMW.options, weights="bf16"),
]

SETS: dict[str, list[Setting]] = {
    "try-adamw": _TRY_ADAMW,
    "try-amsf": _TRY_AMSF,
    "final": COMPARED,
}
WHY = {
    "try-adamw": "AdamW under a cosine to zero, one seed.",
    "try-amsf": "AMSF in fp32, one seed, as many trials.",
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
