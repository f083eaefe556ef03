"""What is wrapped in accelerate is wrapped whoever was imported first, and for AMSF alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from amsf_dist import AMSF
from amsf_dist.integrations import accelerate as hooks


def modules_with(**functions: Any) -> list[ModuleType]:
    """Stand-ins for accelerate's module and for one that has imported its functions."""
    modules = [ModuleType("accelerate.utils.somewhere"), ModuleType("accelerate.accelerator")]
    for module in modules:
        vars(module).update(functions)
    return modules


def test_importers_from_before_get_the_wrapped_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module, importer = modules_with(map_pytorch_optim_to_deepspeed=lambda optimizer: "replaced")
    monkeypatch.setitem(sys.modules, "accelerate.accelerator", importer)
    hooks._wrap_replacement(module)
    param = torch.nn.Parameter(torch.ones(2))
    for holder in (module, importer):
        replace: Any = vars(holder)["map_pytorch_optim_to_deepspeed"]
        assert replace(torch.optim.SGD([param])) == "replaced"
        with pytest.raises(RuntimeError, match="silently replaced by DeepSpeedCPUAdam"):
            replace(AMSF([param]))


def test_an_accelerate_without_the_functions_is_let_be() -> None:
    module = ModuleType("accelerate.utils.somewhere")
    hooks._wrap_replacement(module)
    hooks._wrap_loading(module)
    assert not hasattr(module, "load_fsdp_optimizer")


@pytest.mark.parametrize("saved_at_x", [True, False])
def test_the_mode_of_a_checkpoint_is_laid_out_before_it_is_read(
    saved_at_x: bool, tmp_path: Path
) -> None:
    (module, _), seen = modules_with(load_fsdp_optimizer=None), []
    vars(module)["load_fsdp_optimizer"] = lambda *args, **kwargs: seen.append((args, kwargs))
    hooks._wrap_loading(module)
    saved, ours = (AMSF({"w": torch.nn.Parameter(torch.ones(3))}.items()) for _ in range(2))
    if saved_at_x:
        saved.eval()
    else:
        ours.eval()
    state = {"w": next(iter(saved.state.values()))}
    torch.save({"state": state, "param_groups": []}, tmp_path / "optimizer_1.bin")
    before = next(iter(ours.state)).detach().clone()
    module.load_fsdp_optimizer("plugin", None, ours, None, tmp_path, 1, adapter_only=False)
    assert ("y" in next(iter(ours.state.values()))) is saved_at_x
    assert ours.param_groups[0]["train_mode"] is not saved_at_x
    assert torch.equal(next(iter(ours.state)).detach(), before)
    assert seen == [(("plugin", None, ours, None, tmp_path, 1), {"adapter_only": False})]
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    module.load_fsdp_optimizer("plugin", None, other, None, tmp_path / "nowhere")
    assert len(seen) == 2
