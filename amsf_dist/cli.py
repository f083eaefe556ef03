"""The command line, `amsf`: train, preflight, explain, memory, export, plot, doctor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError, one_line

__all__ = ["app", "main"]

# What typer raises for a wrong command line; newer versions carry their own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# The commands import what they need, so that `amsf --help` does not wait for transformers.
app = typer.Typer(
    name="amsf",
    help="Train with AMSF: block-wise, Schedule-Free, the same update under every sharding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Change keys: steps=100 amsf.lr=3e-3", show_default=False
    ),
]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, evaluate, save, and export a model; run again to continue."""
    words = [config, *(overrides or [])]
    loaded = load_config(config, overrides or [])
    from amsf_dist.train.job import work
    from amsf_dist.train.launch import is_worker, launch
    from amsf_dist.train.parallel import choose_device
    from amsf_dist.train.preflight import local_processes, preflight, quiet_libraries

    command = " ".join(["amsf train", *words])
    number = 1 if is_worker() else local_processes(loaded)
    if number == 1:
        raise typer.Exit(work(loaded, command))
    quiet_libraries()
    preflight(loaded, number)
    raise typer.Exit(launch(["train", *words], number, choose_device(loaded, number)))


@app.command("preflight")
def rehearse_job(config: ConfigPath, overrides: Overrides = None) -> None:
    """Try what a job needs before its first step: limits, GPUs, an all-reduce, a checkpoint."""
    loaded = load_config(config, overrides or [])
    from amsf_dist.train.launch import is_worker, launch
    from amsf_dist.train.parallel import choose_device
    from amsf_dist.train.preflight import local_processes, quiet_libraries
    from amsf_dist.train.rehearsal import rehearse

    number = 1 if is_worker() else local_processes(loaded)
    if number == 1:
        raise typer.Exit(rehearse(loaded))
    quiet_libraries()
    words = ["preflight", config, *(overrides or [])]
    raise typer.Exit(launch(words, number, choose_device(loaded, number)))


@app.command()
def explain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print how every parameter of the config's model is cut in blocks; no weights are made."""
    loaded = load_config(config, overrides or [])
    from amsf_dist.audit import explain as explain_blocks
    from amsf_dist.train.model import build_model, model_config
    from amsf_dist.train.optimizers import check_amsf
    from amsf_dist.train.preflight import quiet_libraries
    from amsf_dist.train.tokens import load_tokenizer

    quiet_libraries()
    check_amsf(loaded)
    model = build_model(loaded, model_config(loaded, load_tokenizer(loaded)), "meta")
    try:
        typer.echo(str(explain_blocks(model, **loaded.amsf)))
    except (TypeError, ValueError) as error:
        raise UserError(f"amsf: {error}") from None


@app.command()
def memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A job's YAML, a model directory, a config.json, or a name: llama-3.1-8b, ...",
        ),
    ],
    overrides: Overrides = None,
    engine: Annotated[
        str | None,
        typer.Option(help="single, ddp, fsdp1, fsdp2, zero1, zero2, zero3.", show_default="fsdp2"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="8; single: 1")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Of all shards (HSDP, with fsdp2).")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (with fp32 weights where needed), fp32.")
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(help="DeepSpeed JSON with the sizes of ZeRO's buffers.")
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", help="Gradient release (single, fsdp2).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the bytes that each process will hold, by owner: AdamW and others beside AMSF.

    A YAML alone is predicted as its job will run; with any option it names a model like the others.
    """
    from amsf_dist.train.estimate import estimate, is_job
    from amsf_dist.train.preflight import local_processes, quiet_libraries

    asked = engine or gpus or replicas > 1 or dtype or deepspeed or release or as_json
    if is_job(model) and not asked:
        loaded = load_config(model, overrides or [])
        from amsf_dist.train.memory import memory_table

        quiet_libraries()
        number = int(os.environ.get("WORLD_SIZE", 0)) or local_processes(loaded)
        typer.echo(memory_table(loaded, number))
        return
    quiet_libraries()
    found = estimate(model, overrides or [], engine, gpus, replicas, dtype, deepspeed, release)
    typer.echo(found.as_json() if as_json else str(found))


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="output_dir, or one step_*.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
) -> None:
    """Write a checkpoint as a safetensors directory that transformers loads, at the average x."""
    from amsf_dist.train.export import export_checkpoint
    from amsf_dist.train.preflight import quiet_libraries

    quiet_libraries()
    step = export_checkpoint(Path(source), Path(out))
    typer.echo(f"wrote {out}: the weights to evaluate after step {step}")


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="output_dir of each run.")],
    out: Annotated[
        str, typer.Option(help="Picture of several runs side by side.", metavar="FILE")
    ] = "comparison.png",
) -> None:
    """Draw loss.png and memory.png of a run again, or several runs in one picture."""
    from amsf_dist.train.charts import draw, draw_together

    folders = [Path(run) for run in runs]
    written = draw(folders[0]) if len(folders) == 1 else [draw_together(folders, Path(out))]
    for path in written:
        typer.echo(f"wrote {path}")


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="DeepSpeed JSON, or what `accelerate config` writes; none: torch alone.",
            show_default=False,
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes to start here.")] = 2,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one collective.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a tiny model as CONFIG says, and compare with a plain fp64 reference."""
    from amsf_dist.doctor.command import doctor as examine

    raise typer.Exit(examine(config, nproc, timeout, as_json))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        result = app(
            args=arguments if arguments is None else list(arguments), standalone_mode=False
        )
        code = result if isinstance(result, int) else 0
    except UserError as error:
        if error.everywhere is False or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"amsf: {error}\n")
        code = 2
    except _UsageError as error:
        sys.stderr.write(f"amsf: {one_line(error)}; see amsf --help\n")
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("amsf: stopped\n")
        code = 130
    sys.exit(code)
