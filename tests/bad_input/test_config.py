"""A mistake in a config or a command: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import run_as_user, tree, write_config

from amsf_dist import cli

# Words after the config, and what the line must hold.
MISTAKES = {
    "an unknown key": ("stepz=3", "unknown key stepz; did you mean steps?"),
    "an unknown key below": ("data.sequence_lenght=3", "did you mean sequence_length?"),
    "text for a number": ("steps=many", 'steps must be a whole number, got "many"'),
    "a fraction for a count": ("steps=1.5", "steps must be a whole number, got 1.5"),
    "a number in quotes": ("adamw.lr='1e-3'", "write it without quotes"),
    "a number below its range": ("adamw.lr=-1", "adamw.lr must be above 0.0, got -1"),
    "a number above its range": ("adamw.betas=[0.9, 2.0]", "adamw.betas.1 must be below 1.0"),
    "a list of another length": ("adamw.betas=[0.9]", "adamw.betas must be a list of 2"),
    "not a number at all": ("max_grad_norm=.nan", "max_grad_norm must be"),
    "an unknown word": ("precision=fp16", "precision must be fp32, mixed or bf16"),
    "a section that is none": ("data=5", "data must be a section"),
    "a section below a number": ("steps.x=3", "steps is 6, which has no keys"),
    "no value": ("steps", "'steps' is not key=value"),
    "a value that is not YAML": ("steps=[", "not valid YAML"),
    "a key that is empty": ("output_dir=", "output_dir must be text, got null"),
    "a baseline that is the run": ("compare=[amsf]", "remove it from compare"),
    "a batch that does not divide": ("nproc=4 ; parallel=ddp", "global_batch_size=4"),
    "shards that do not divide": (
        "parallel=fsdp2 ; nproc=3 ; shard_degree=2",
        "must be a multiple of shard_degree (2)",
    ),
    "shards of what is not sharded": ("shard_degree=2", "goes with parallel=fsdp2"),
    "a micro-batch that does not": ("micro_batch_size=4", "micro_batch_size=6"),
    "micro-batches that do not": ("accumulation.steps=4", "accumulation.steps=6"),
    "micro-batches told twice": (
        "accumulation.steps=3 ; micro_batch_size=3",
        "the latter makes 2 micro-batches; leave one of them out",
    ),
    "a way to accumulate": (
        "accumulation.mode=exactly",
        "accumulation.mode must be exact or state",
    ),
    "gradients into the state": ("accumulation.mode=state", "set release=true"),
    "release under DDP": ("release=true ; parallel=ddp", "use parallel=fsdp2"),
    "release under DeepSpeed": (
        "release=true ; parallel=deepspeed ; deepspeed=x.json",
        "keeps gradients in buffers of its own",
    ),
    "release of AdamW": ("release=true ; optimizer=adamw", "use release=false"),
    "a way to clip": ("clip=value", "clip must be norm, block or tensor"),
    "clipping told twice": ("amsf.clip=block", "say clip and max_grad_norm beside steps"),
    "norms of what is joined": (
        "clip=tensor ; parallel=deepspeed ; deepspeed=x.json",
        "use clip=block or norm",
    ),
    "norms whose bits differ": (
        "clip=tensor ; amsf.deterministic=true",
        "with deterministic=True use clip='block'",
    ),
    "processes for a single one": ("nproc=2", "parallel=single takes nproc=1"),
    "a warmup beyond the end": ("compare=[adamw] ; adamw.warmup_steps=9", "below steps (6)"),
    "stale bf16 weights": ("optimizer=adamw ; precision=bf16", "use precision=mixed"),
    "an argument AMSF lacks": ("amsf.learning_rate=1e-3", "AMSF has no argument"),
    "an AMSF number in range": ("amsf.betas=[0.9, 1.5]", "beta2 must be in [0, 1), got 1.5"),
    "an AMSF word": ("amsf.averaging=sometimes", "averaging must be one of"),
    "an AMSF block rule": ("amsf.blocks=colum", "blocks"),
    "text that does not exist": ("data.path=/no/such/text", "/no/such/text does not exist"),
    "a model that does not exist": (
        "model={'path':'/no/such/model'}",
        "model.path: /no/such/model is not a directory",
    ),
    "two models": ("model.path=/tmp", "exclude each other"),
    "a model type": ("model.type=lama", "did you mean llama?"),
    "a model key": ("model.config.hidden_sise=8", "did you mean hidden_size?"),
    "heads that do not divide": (
        "model.config.num_attention_heads=5",
        "not a multiple of the number",
    ),
    "groups that do not divide": ("model.config.num_key_value_heads=3", "num_key_value_heads (3)"),
    "sequences that are too long": ("data.sequence_length=65", "max_position_embeddings=64"),
    "a vocabulary too small": ("model.config.vocab_size=10", "has 257 tokens"),
    "too little text": ("data.validation_fraction=0.001", "give more text"),
    "GPUs that are not there": ("device=cuda", "set nproc="),
    "a package that is missing": ("log.wandb=true", "pip install wandb"),
    "DeepSpeed without its file": ("parallel=deepspeed", "needs deepspeed, the path of its JSON"),
    "bf16 weights alone under DeepSpeed": (
        "parallel=deepspeed ; deepspeed=x.json ; precision=bf16",
        "use precision=mixed",
    ),
    "a DeepSpeed file that does not exist": (
        "parallel=deepspeed ; deepspeed=/no/zero.json",
        "deepspeed: /no/zero.json does not exist",
    ),
    "an output that is a file": ("output_dir=/dev/null", "/dev/null is a file"),
}


def one_error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run `amsf` in this process and return its only line on stderr."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert exit.value.code == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("amsf: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    mistake: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, expected = MISTAKES[mistake]
    if "wandb" in words:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = write_config(tmp_path)
    before = tree(tmp_path)
    error = one_error(capsys, "train", config, *words.split(" ; "))
    assert expected in error
    assert tree(tmp_path) == before


def test_a_mistake_in_the_file_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, stepz=3, typo=4)
    error = one_error(capsys, "train", config)
    assert f"{config}: unknown key stepz" in error and "(and 1 more)" in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps: [1", "line 1, column"),
        ("steps: 1\nsteps: 2", "the key 'steps' is given twice"),
        ("", "holds no `key: value` lines"),
        ("- a", "holds no `key: value` lines"),
        ("steps: 1", "the key output_dir is missing"),
    ],
)
def test_a_file_that_is_no_config(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert expected in one_error(capsys, "train", path)


def test_a_config_that_does_not_exist_suggests_its_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert f"did you mean {config}?" in one_error(capsys, "train", tmp_path / "confg.yaml")
    assert "Is a directory" in one_error(capsys, "train", tmp_path)


@pytest.mark.parametrize("words", [["train"], ["trian", "x"], ["plot"], ["train", "--fast", "x"]])
def test_a_command_line_that_is_wrong(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "amsf --help" in one_error(capsys, *words)


def test_the_other_commands_name_what_they_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give the output_dir" in one_error(capsys, "plot", tmp_path)
    out = tmp_path / "out"
    assert "not a complete checkpoint" in one_error(capsys, "export", tmp_path, out)
    assert "not an empty directory" in one_error(capsys, "export", tmp_path, tmp_path.parent)
    assert "AMSF has no argument" in one_error(
        capsys, "explain", write_config(tmp_path), "amsf.heads=3"
    )
    assert not out.exists()


def test_several_processes_are_not_started_for_a_mistake(tmp_path: Path) -> None:
    config = write_config(tmp_path, nproc=2, parallel="fsdp2", data={"path": str(tmp_path / "no")})
    before = tree(tmp_path)
    out, err = run_as_user("train", config, code=2)
    assert out == "" and err.count("\n") == 1 and "does not exist" in err
    assert tree(tmp_path) == before


def test_under_torchrun_one_process_speaks(tmp_path: Path) -> None:
    config = write_config(tmp_path, parallel="fsdp2", data={"path": str(tmp_path / "no")})
    before = tree(tmp_path)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _, err = run_as_user("train", config, "nproc=auto", code=1, launcher=launcher)
    assert err.count("amsf: data.path") == 1
    assert tree(tmp_path) == before
