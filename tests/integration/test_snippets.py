"""Every piece of code in README.md and in two pages of docs/ is run; a new one fails until it is.

The same names are there for all of them: a tiny Llama `model`, `batches`, `evaluate`, data sets,
`rank` and `device`. Pieces start where their first line says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from trainers import llama, sequences

from amsf_dist import AMSF
from amsf_dist.doctor.wrapped import whole_weights
from amsf_dist.integrations.accelerate import unwrapped

ROOT = Path(__file__).parents[2]
PLAIN, FSDP2 = "from amsf_dist import AMSF", "from torch.distributed.fsdp import fully_shard"
ACCELERATE = "from accelerate import Accelerator"
PROCESSES = {
    "README.md": {
        PLAIN: 1,
        FSDP2: 2,
        "from torch.distributed.fsdp import FullyShardedDataParallel as FSDP": 2,
        "import amsf_dist, deepspeed": 2,
        "accelerator = Accelerator()": 2,
        "from amsf_dist.integrations.transformers import AMSFFactory, AveragedWeights": 1,
        "from amsf_dist import enable_gradient_release": 1,
    },
    "docs/accelerate.md": {ACCELERATE: 2, "from accelerate.utils import DummyOptim": 2},
    "docs/trainer.md": {"from transformers import Trainer, TrainingArguments": 1},
}
"""File -> first line of a piece of Python -> processes that it is run in."""
COMMANDS = {
    "amsf": "test_train.py and its neighbours, test_doctor.py, unit/test_estimate.py",
    "launch/accelerate.sh": "test_accelerate.py",
    "launch/docker.sh": "containers/test_image.py",
    "make": "CI itself",
    "torchrun": "test_accelerate.py, by accelerate's launcher",
}
"""First word of a command -> where it is run."""
STEPS = 4


def fenced(file: str, language: str) -> list[str]:
    """The pieces of code of one language; "" for commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / file).read_text(), re.M | re.S)
    return [code for kind, code in found if kind == language]


def first_line(code: str) -> str:
    return code.splitlines()[0].split("  #")[0].rstrip()


def surroundings() -> dict[str, Any]:
    """What the snippets take for granted."""
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    model, rank = llama(), dist.get_rank()
    rows = sequences(2 * STEPS * dist.get_world_size())
    batches = []
    for step in range(STEPS):
        tokens = torch.stack([row["input_ids"] for row in rows[step * 2 + rank :][:2]])
        batches.append({"input_ids": tokens, "labels": tokens})

    @torch.no_grad()
    def evaluate(model: Any) -> float:
        return float(model(**batches[0]).loss)

    return {
        "AMSF": AMSF,
        "Accelerator": Accelerator,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "batches": batches,
        "device": torch.device("cpu"),
        "eval_dataset": rows,
        "evaluate": evaluate,
        "model": model,
        "rank": rank,
        "torch": torch,
        "train_dataset": rows,
    }


def prepare(first: str, names: dict[str, Any], snippets: dict[str, str]) -> None:
    """What one snippet needs besides: a file, an environment, the snippet that it follows."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size)
    os.environ.update(LOCAL_WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if first == "import amsf_dist, deepspeed":
        Path("zero3.json").write_text(json.dumps(zero3(snippets["json"])))
    if first == "from accelerate.utils import DummyOptim":
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        del os.environ["ACCELERATE_USE_CPU"]
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        offloaded = json.loads((ROOT / "configs/accelerate/zero3_offload.json").read_text())
        offloaded["train_micro_batch_size_per_gpu"] = 2
        del offloaded["bf16"]
        names["accelerator"] = names["Accelerator"](
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=offloaded),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
    if first == "from amsf_dist import enable_gradient_release":
        names["optimizer"] = AMSF(names["model"], lr=4e-3)


def zero3(fragment: str) -> dict[str, Any]:
    """A file of configs/deepspeed with the README's optimizer."""
    settings: dict[str, Any] = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    del settings["train_batch_size"], settings["optimizer"]
    settings.pop("bf16", None)  # weights of 16 bits do not show the first steps of a warm-up
    return {"train_micro_batch_size_per_gpu": 2, **settings, **json.loads(f"{{{fragment}}}")}


def optimizer_in(names: dict[str, Any]) -> AMSF:
    """The AMSF that a snippet has made."""
    if "engine" in names:
        return names["engine"].basic_optimizer  # type: ignore[no-any-return]
    held = names["trainer"].optimizer if "trainer" in names else names["optimizer"]
    found = unwrapped(held)
    assert found is not None
    return found


def run_all(file: str, processes: int, folder: str) -> int:
    """Run the snippets of one file that want this many processes; each has a folder."""
    torch.manual_seed(0)
    count = 0
    texts = {"json": "".join(fenced(file, "json"))}
    for code in fenced(file, "python"):
        first = first_line(code)
        if PROCESSES[file].get(first) != processes:
            continue
        place = Path(folder) / f"{file.replace('/', ' ')} {count} {dist.get_rank()}"
        place.mkdir()
        os.chdir(place)
        names = surroundings()
        before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
        prepare(first, names, texts)
        exec(compile(code, f"{file}: {first}", "exec"), names)
        steps = STEPS if "trainer" not in names else 1
        if "DummyOptim" in code or "release" in code:  # they begin a loop that stands elsewhere
            loss = names["model"](**names["batches"][0]).loss
            names["accelerator"].backward(loss) if "accelerator" in names else loss.backward()
            names["optimizer"].step()
            steps = 1
        optimizer = optimizer_in(names)
        assert all(float(state["step"]) >= steps for state in optimizer.state.values()), first
        weights = whole_weights(names.get("engine", names["model"]))
        assert weights.keys() == before.keys(), first
        moved = [name for name in weights if not torch.equal(weights[name], before[name])]
        assert len(moved) == len(before), f"{first}: {before.keys() - set(moved)} did not move"
        count += 1
    return count


@pytest.mark.parametrize("processes", [1, 2])
def test_every_snippet_runs(processes: int, tmp_path: Path) -> None:
    (tmp_path / str(processes)).mkdir()
    for file, of in PROCESSES.items():
        expected = list(of.values()).count(processes)
        if expected:
            ran = run_ranks(processes, run_all, file, processes, str(tmp_path))
            assert ran == [expected] * processes


@pytest.mark.parametrize("file", PROCESSES)
def test_no_snippet_is_left_out(file: str) -> None:
    assert [first_line(code) for code in fenced(file, "python")] == list(PROCESSES[file])
    known = re.findall(r"^```(\w*)$", (ROOT / file).read_text(), re.M)
    assert set(known) <= {"", "bash", "python", "json"}
    for fragment in fenced(file, "json"):
        named = json.loads(f"{{{fragment}}}")["optimizer"]
        assert named["type"] == "AMSF"
        given = {key: value for key, value in named["params"].items() if value != "auto"}
        AMSF([torch.nn.Parameter(torch.ones(2))], **given)


@pytest.mark.parametrize("file", PROCESSES)
def test_every_command_is_one_that_exists(file: str) -> None:
    """What they do is tested elsewhere; here, that targets, commands and files are there."""
    from amsf_dist.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = "".join(fenced(file, "") + fenced(file, "bash"))
    for line in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if not words:
            continue
        assert words[0] in COMMANDS, f"{line}: say where it is run"
        assert words[0] != "make" or words[1] in targets, line
        assert words[0] != "amsf" or words[1] in known, line
        for word in words:
            if word.startswith(("configs/", "launch/", "examples/")):
                assert (ROOT / word).exists(), line
