"""The name in DeepSpeed's JSON is there whoever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amsf_dist.integrations.on_import import on_import


def test_a_module_imported_later_calls_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_later.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    on_import("imported_later", lambda module: seen.append(module.value))
    assert not seen
    import imported_later  # type: ignore[import-not-found]

    assert seen == [7]
    assert imported_later.__spec__.loader.get_source("imported_later") == "value = 7\n"
    on_import("imported_later", lambda module: seen.append(-module.value))
    assert seen == [7, -7]
    monkeypatch.delitem(sys.modules, "imported_later")


def test_a_module_that_does_not_exist_is_still_missing() -> None:
    on_import("amsf_no_such_module", lambda module: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        __import__("amsf_no_such_module")


@pytest.mark.parametrize("first", ["amsf_dist", "deepspeed"])
def test_either_may_be_imported_first(first: str) -> None:
    second = "deepspeed" if first == "amsf_dist" else "amsf_dist"
    program = f"""
import {first}
import {second}
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from amsf_dist import AMSF
assert torch.optim.AMSF is AMSF
assert ZERO_SUPPORTED_OPTIMIZERS.count(AMSF) == 1
assert hasattr(DeepSpeedEngine._configure_optimizer, "__wrapped__")
assert hasattr(DeepSpeedEngine.load_checkpoint, "__wrapped__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_deepspeed_is_not_imported_for_those_who_do_not_use_it() -> None:
    program = "import sys, amsf_dist; assert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
