"""Small training jobs for the tests: a text, a config file, and `amsf` in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ranks  # it also sets where DeepSpeed compiles: not in the user's folder
import torch
import yaml

from amsf_dist import cli
from amsf_dist.train.config_file import load_config

SMALL: dict[str, Any] = {
    "nproc": 1,
    "parallel": "single",
    "device": "cpu",
    "model": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    },
    "data": {"sequence_length": 32, "validation_fraction": 0.2},
    # eps: where a true gradient is zero, rounding noise must not become a full-size step.
    "amsf": {"lr": 3.0e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1.0e-5},
    "adamw": {"lr": 3.0e-3, "eps": 1.0e-5, "warmup_steps": 1},
    "steps": 6,
    "global_batch_size": 6,
    "eval_every": 3,
    "save_every": 100,
    "log": {"every": 1},
    "sample": {"tokens": 0},
}


def text(num_words: int = 1200) -> str:
    """Return words in a fixed random order: enough for a few batches, learnable at once."""
    words = "the quick brown fox jumps over a lazy dog while été naïve ünïcode".split()
    return " ".join(random.Random(0).choices(words, k=num_words))


def write_config(directory: Path, **changes: Any) -> Path:
    """Write `SMALL` with changes (sections are merged) and its text; return the config's path."""
    values = {**SMALL, "output_dir": str(directory / "run")}
    data = directory / "text.txt"
    data.write_text(text())
    values["data"] = {**SMALL["data"], "path": str(data)}
    for key, value in changes.items():
        merge = isinstance(value, dict) and key in ("data", "log", "sample", "amsf", "adamw")
        values[key] = {**values.get(key, {}), **value} if merge else value
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(*words: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `amsf` in its own process group; `launcher` goes before it (torchrun)."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "amsf_dist", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )


def run_as_user(*words: object, code: int = 0, launcher: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run `amsf` to its end, check the exit code, and return stdout and stderr."""
    process = start(*words, launcher=launcher)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def train(config: Path, *overrides: str) -> tuple[str, str]:
    """`amsf train` to its good end, without the seconds that torch takes to be imported.

    On as many processes as the config says, started as torchrun starts them but from the fork
    server, which has imported everything.

    Returns:
        stdout and stderr, of all processes one after another.
    """
    told = load_config(str(config), overrides).nproc
    nproc = told if isinstance(told, int) else 1  # "auto": there is no GPU
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [
            ranks.context.Process(
                target=_worker, args=(folder, rank, nproc, port, ["train", str(config), *overrides])
            )
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        out, err = (
            "".join(Path(folder, f"{name}{rank}").read_text() for rank in range(nproc))
            for name in ("out", "err")
        )
    assert codes == [0] * nproc, f"exit codes {codes}\n{out}\n{err}"
    return out, err


def _worker(folder: str, rank: int, nproc: int, port: int, words: list[str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    gc.freeze()
    if nproc > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    code = 1
    try:
        cli.main(words)
    except SystemExit as exit:
        code = int(exit.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads must not outlive the group they wait for


def metrics(directory: Path, kind: str, key: str = "loss") -> dict[int, float]:
    """Return step -> value from a run's metrics.jsonl."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if line["kind"] == kind}


def tree(directory: Path) -> set[str]:
    """Return every file and folder below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
