"""Every file in configs/: read, checked, and its model and optimizer built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from amsf_dist.train.config import Config
from amsf_dist.train.config_file import load_config
from amsf_dist.train.memory import predict
from amsf_dist.train.preflight import shapes_only
from amsf_dist.train.zero.config import deepspeed_config, read_deepspeed_json

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
YAMLS = sorted(CONFIGS.glob("*.yaml"))
JSONS = sorted((CONFIGS / "deepspeed").rglob("*.json"))

SIZES = {
    "llama_125m_single": (1, 84_000_000),
    "llama_125m_ddp": (8, 84_000_000),
    "llama_1b_fsdp2": (8, 970_000_000),
    "llama_1b_zero2": (8, 970_000_000),
    "llama_8b_fsdp2": (8, 8_030_261_248),
    "llama_8b_zero3": (8, 8_030_261_248),
    "llama_70b_fsdp2": (64, 70_553_706_496),
    "llama_70b_zero3": (64, 70_553_706_496),
}
"""GPUs that a file is meant for, and its parameters: at least so many, for a small vocabulary."""
A_GPU = 80e9


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the files are relative to the folder that holds configs/."""
    monkeypatch.chdir(ROOT)


def without_its_files(path: Path, directory: Path) -> Config:
    """The config with what it reads from disk replaced: the byte tokenizer, a small model."""
    config = load_config(path)
    words = []
    if config.tokenizer_directory is not None:
        words.append("data.tokenizer=bytes")
    if config.model.path is not None:
        AutoConfig.for_model("llama", num_hidden_layers=2).save_pretrained(directory)
        (directory / "model.safetensors").touch()  # not read on the meta device
        words.append(f"model.path={directory}")
    return load_config(path, words)


def test_no_file_is_left_out() -> None:
    apart = CONFIGS / "accelerate"  # accelerate's own, with tests of their own
    files = {path for path in CONFIGS.rglob("*") if path.is_file() and apart not in path.parents}
    assert files == {*YAMLS, *JSONS}


def test_every_size_is_there() -> None:
    assert set(SIZES) == {path.stem for path in YAMLS if path.stem.startswith("llama_")}


@pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])
def test_the_model_and_the_optimizer_can_be_built(
    path: Path, tmp_path: Path, at_root: None
) -> None:
    config = without_its_files(path, tmp_path)
    model, _ = shapes_only(config)
    parameters = sum(param.numel() for param in model.parameters())
    processes, at_least = SIZES.get(path.stem, (2, 0))
    assert at_least <= parameters < max(at_least * 1.2, 1e9)
    assert config.micro_batches(processes) >= 1
    if config.parallel == "deepspeed":
        settings = deepspeed_config(config, processes)
        assert settings["train_batch_size"] == config.global_batch_size
    if path.stem in SIZES:
        owners, _ = predict(config, processes)
        assert sum(owners.values()) < A_GPU


@pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])
def test_what_was_measured_is_what_is_set(path: Path) -> None:
    config = load_config(path)
    assert config.amsf["betas"] == [0.9, 0.99] and config.amsf.get("r", 2.0) == 2.0
    if path.stem in SIZES and path.stem != "llama_1b_fsdp2":
        assert config.amsf["warmup_steps"] * 5 >= config.steps  # README, limits


@pytest.mark.parametrize("path", JSONS, ids=[str(path.relative_to(CONFIGS)) for path in JSONS])
def test_a_deepspeed_file_goes_with_a_config_that_names_it(path: Path, at_root: None) -> None:
    assert json.loads(path.read_text()) == read_deepspeed_json(path)
    name = str(path.relative_to(ROOT))
    named = [load_config(yaml) for yaml in YAMLS]
    users = [config for config in named if config.deepspeed == name]
    if not users:  # another stage of the quickstart
        users = [load_config(CONFIGS / "quickstart_zero3.yaml", [f"deepspeed={name}"])]
    for config in users:
        assert deepspeed_config(config, 8)["zero_optimization"]["stage"] in (1, 2, 3)
