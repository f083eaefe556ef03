"""The settings of the study, by set: what was tried to choose, and what is compared in the end."""

from __future__ import annotations

from benchmarks.convergence.setting import COARSE, Setting

__all__ = ["COMPARED", "IN_PICTURE", "REFERENCE", "SETS", "WHY", "settings_of"]

# Where the search began.
_ADAMW = Setting("adamw", "adamw", {"lr": 4e-3, "betas": [0.9, 0.95], "warmup_steps": 150})
_AMSF = Setting(
    "amsf",
    "amsf",
    {"lr": 4e-3, "betas": [0.95, 0.99], "r": 2.0, "warmup_steps": 150, "blocks": "auto"},
)

# As many trials for AdamW as for AMSF.
_TRY_ADAMW = [
    *(_ADAMW.but(f"AdamW lr {lr:g}", COARSE, lr=lr) for lr in (2e-3, 4e-3, 6e-3)),
]
_TRY_AMSF = [
    *(_AMSF.but(f"AMSF lr {lr:g}", COARSE, lr=lr) for lr in (4e-3, 6e-3, 3e-3)),
]

# What was chosen.
REFERENCE = "AdamW + cosine"
_TUNED_ADAMW = _ADAMW.but(REFERENCE)
_TUNED_AMSF = _AMSF.but("AMSF")
COMPARED = [
    _TUNED_ADAMW,
    Setting("Adam-mini + cosine", "adam_mini", _TUNED_ADAMW.options),
    Setting(
        "AdamWScheduleFree",
        "adamw_schedule_free",
        {key: value for key, value in _TUNED_AMSF.options.items() if key != "blocks"},
    ),
    *(
        _TUNED_AMSF.but(f"AMSF fp32, blocks {blocks}", blocks=blocks)
        for blocks in ("auto", "element", "row", "adam_mini", "tensor")
    ),
    Setting("FlashAdamW + cosine", "flash_adamw", _TUNED_ADAMW.options, weights="bf16"),
]

SETS: dict[str, list[Setting]] = {
    "try-adamw": _TRY_ADAMW,
    "try-amsf": _TRY_AMSF,
    "final": COMPARED,
}
WHY = {
    "try-adamw": "AdamW under a cosine to zero. One seed each; the best go on to three.",
    "try-amsf": "AMSF in fp32. One seed each; the best go on to three.",
}
IN_PICTURE = [REFERENCE, "AdamWScheduleFree", "Adam-mini + cosine", "AMSF fp32, blocks auto"]


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
