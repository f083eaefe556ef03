"""`amsf train` in real processes: the same run under every parallelism, and what it leaves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import metrics, run_as_user, train, tree, write_config
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from amsf_dist import cli

pytestmark = pytest.mark.xdist_group("train")  # they share the run below

TWO = {"nproc": 2, "parallel": "fsdp2"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LOSS = {"rel": 2e-6, "abs": 0}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and its baseline on one process, and what was printed."""
    directory = tmp_path_factory.mktemp("single")
    config = write_config(
        directory,
        compare=["adamw"],
        eval_every=1,
        sample={"prompt": "the lazy", "tokens": 20},
        log={"tensorboard": True, "diagnostics_every": 2},
    )
    out, _ = train(config)
    return directory / "run", out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes under FSDP2; its folder holds the config."""
    directory = tmp_path_factory.mktemp("sharded")
    changes = {"eval_every": 1, "log": {"diagnostics_every": 2}}
    run_as_user("train", write_config(directory, **changes, **TWO))
    return directory


def amsf(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that starts nothing in this process, and return what it prints."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert exit.value.code == 0, captured.err
    return captured.out


def assert_same_losses(here: Path, there: Path) -> None:
    for kind in ("train", "validation"):
        assert metrics(here, kind) == pytest.approx(metrics(there, kind), **LOSS)


def test_two_processes_under_fsdp2_are_one(single: tuple[Path, str], sharded: Path) -> None:
    assert_same_losses(sharded / "run", single[0])


def test_copies_of_two_shards_each_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HSDP on four processes, continued on two that are copies of each other."""
    (tmp_path / "one").mkdir()
    train(write_config(tmp_path / "one", eval_every=1, global_batch_size=8))
    four = {"nproc": 4, "parallel": "fsdp2", "shard_degree": 2}
    config = write_config(tmp_path, eval_every=1, global_batch_size=8, **four)
    train(config, "steps=3")
    owners = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    total = re.search(r"^total +([0-9.]+) kB", amsf(capsys, "memory", config), re.MULTILINE)
    assert total and float(total[1]) * 1000 == pytest.approx(sum(owners.values()), rel=0.01)
    train(config, "nproc=2", "shard_degree=1")
    assert_same_losses(tmp_path / "run", tmp_path / "one" / "run")


def test_torchrun_ddp_and_accumulation_are_one(single: tuple[Path, str], tmp_path: Path) -> None:
    config = write_config(tmp_path, nproc="auto", parallel="ddp", micro_batch_size=1, eval_every=1)
    run_as_user("train", config, launcher=TORCHRUN)
    assert_same_losses(tmp_path / "run", single[0])


def test_tied_weights_are_one_parameter_under_fsdp2(tmp_path: Path) -> None:
    for name, changes in (("one", {}), ("two", {**TWO, "micro_batch_size": 1})):
        directory = tmp_path / name
        directory.mkdir()
        config = write_config(directory, eval_every=1, **changes)
        train(config, "model.config.tie_word_embeddings=true")
        model = AutoModelForCausalLM.from_pretrained(directory / "run" / "model")
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_losses(tmp_path / "two" / "run", tmp_path / "one" / "run")


def test_the_run_leaves_what_it_promises_and_no_litter(single: tuple[Path, str]) -> None:
    directory, out = single
    files = tree(directory)
    assert {"metrics.jsonl", "config.yaml", "summary.json", "loss.png", "memory.png"} <= files
    assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= files
    assert "checkpoints/step_00000006/job.json" in files
    assert not [name for name in files if "tmp" in name]
    assert "the lazy" in out and "AMSF" in out and "bits per byte" in out
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    wanted = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory", "skipped_steps"}
    assert wanted <= last.keys() and last["tokens"] == 6 * 6 * 32


def test_validation_is_at_x_and_the_export_is_that_model(single: tuple[Path, str]) -> None:
    directory, _ = single
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokens = np.fromfile(directory / "tokens.bin", "<u2").astype(np.int64)
    held_out = torch.from_numpy(tokens[len(tokens) - int(len(tokens) * 0.2) :])
    windows = held_out.unfold(0, 33, 32)
    logits = model(input_ids=windows[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert metrics(directory, "validation")[6] == pytest.approx(loss, rel=1e-5)
    # Every target but the end of the text is one byte.
    text_bytes = int((windows[:, 1:] < 256).sum())
    bits = loss * windows[:, 1:].numel() / math.log(2) / text_bytes
    assert metrics(directory, "validation", "bits_per_byte")[6] == pytest.approx(bits, rel=1e-5)


def test_export_of_a_checkpoint_is_x_and_not_y(
    single: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = single
    amsf(capsys, "export", directory, tmp_path / "out")
    amsf(capsys, "export", directory / "checkpoints" / "step_00000006", tmp_path / "again")
    models = [
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (directory / "model", tmp_path / "out", tmp_path / "again")
    ]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]) and torch.equal(value, models[2][name])
    saved = {"model": {name: torch.empty_like(value) for name, value in models[0].items()}}
    torch.distributed.checkpoint.load(
        saved, checkpoint_id=directory / "checkpoints" / "step_00000006", no_dist=True
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(saved["model"][name], models[0][name], atol=1e-5)


def test_the_export_writes_text_with_its_own_tokenizer(single: tuple[Path, str]) -> None:
    directory, _ = single
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    prompt = tokenizer("né", return_tensors="pt", add_special_tokens=False)
    assert prompt["input_ids"].tolist() == [list("né".encode())]
    tokens = model.generate(
        prompt["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=256
    )
    assert tokenizer.decode(tokens[0]).startswith("né")


def test_a_model_directory_is_fine_tuned(single: tuple[Path, str], tmp_path: Path) -> None:
    model = {"path": str(single[0] / "model")}
    train(write_config(tmp_path, model=model, optimizer="adamw", steps=2))
    before, after = metrics(single[0], "validation")[6], metrics(tmp_path / "run", "validation")[2]
    assert after < before
    assert metrics(tmp_path / "run", "train")[1] < metrics(single[0], "train")[1] - 0.5


def test_gradients_that_stay_infinite_end_the_run_with_a_cure(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=60, eval_every=100, amsf={"lr": 1e30})
    _, err = run_as_user("train", config, code=2)
    assert "no finite gradient in 20 steps; lower the learning rate" in err.splitlines()[-1]
    assert max(metrics(tmp_path / "run", "train", "skipped_steps").values()) == 20


def test_the_baseline_sees_the_same_batches_from_the_same_weights(
    single: tuple[Path, str],
) -> None:
    directory, out = single
    assert "AMSF" in out and "AdamW + cosine" in out
    assert metrics(directory, "train")[1] == metrics(directory / "adamw", "train")[1]
    assert list((directory / "tensorboard").glob("events*"))


def test_the_optimizers_figures_are_those_of_one_process(
    single: tuple[Path, str], sharded: Path
) -> None:
    for figure in ("lr", "ckp1", "distance", "stale", "clipped"):
        alone = metrics(single[0], "optimizer", figure)
        assert list(alone) == [2, 4, 6]
        assert metrics(sharded / "run", "optimizer", figure) == pytest.approx(alone, rel=1e-3)
    stale = metrics(sharded / "run", "optimizer", "stale_by_parameter")[6]
    blocks = metrics(sharded / "run", "optimizer", "stale_by_block")[6]
    assert stale.keys() == blocks.keys() and "model.layers.1.mlp.up_proj.weight" in stale
    assert blocks == metrics(single[0], "optimizer", "stale_by_block")[6]  # fp32: nothing is stale
    assert metrics(single[0], "memory", "owners").keys() == {1, 6}  # and after the last step


def test_plot_draws_runs_side_by_side(
    single: tuple[Path, str], sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.png"
    adamw = single[0] / "adamw"
    (adamw / "config.yaml").write_text("{optimizer: adamw, compare: []}")
    assert str(out) in amsf(capsys, "plot", single[0], adamw, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):  # both are called "run"
        cli.main(["plot", str(single[0]), str(sharded / "run")])
    assert "another run has the same name" in capsys.readouterr().err


def test_plot_draws_the_charts_again(
    single: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [single[0] / "loss.png", single[0] / "memory.png"]
    for path in drawn:
        path.unlink()
    amsf(capsys, "plot", single[0])
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_memory_predicts_what_a_process_holds(
    sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = amsf(capsys, "memory", sharded / "config.yaml")
    total = next(line.split() for line in out.splitlines() if line.startswith("total"))
    owners = json.loads((sharded / "run" / "summary.json").read_text())["memory"]
    assert float(total[1]) * 1000 == pytest.approx(sum(owners.values()), rel=0.01)
    assert float(total[3]) > float(total[1])


def test_explain_prints_the_block_table(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = amsf(capsys, "explain", sharded / "config.yaml")
    assert "model.layers.0.self_attn.q_proj.weight" in out and "head" in out
