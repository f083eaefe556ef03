"""Run a function on several gloo processes and bring its results home.

Children come from a fork server that has imported torch already, so that a test with four ranks
costs tenths of a second, not four interpreter starts.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120

# DeepSpeed compiles a CPU collective when it is first used, and a killed process leaves a lock
# behind that hangs all later ones: so not in the user's own folder of extensions, and one for
# every environment, which would otherwise compile what another has.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_place = zlib.crc32(f"{os.getuid()} {sys.prefix} {torch.__version__}".encode())
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"amsf-extensions-{_place:08x}")
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "torch._dynamo",  # the first optimizer of a process imports it, for a second or two
        "amsf_dist",
        "amsf_dist.kernels.native.stepper",
        "amsf_dist.train.job",
        "amsf_dist.train.torch_trainer",
        "transformers.models.llama.modeling_llama",
        "deepspeed",
        # where engines are made, with a torch.compile of a second on the way
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.bf16_optimizer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)


def apart(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a function in a new process for each tuple of arguments, two at a time.

    For what torch keeps beyond the end of a process group: meshes, fake groups.
    """
    with context.Pool(2, maxtasksperchild=1) as pool:
        return pool.starmap_async(function, calls, chunksize=1).get(TIMEOUT_SECONDS)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a new gloo process group.

    Args:
        world_size: number of processes.
        function: importable by name (defined at the top of a test module).
        *args: picklable.

    Returns:
        What each rank returned, in rank order; tensors as they were.

    Raises:
        AssertionError: a rank raised, or did not come back; the message has its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(folder, rank, world_size, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_SECONDS)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        failures = [_read(folder, "failure", rank) for rank in range(world_size)]
        told = "\n".join(failure for failure in failures if failure)
        assert not stuck and not told, f"ranks {stuck} did not come back\n{told}"
        results = [_read(folder, "result", rank) for rank in range(world_size)]
        assert all(result is not None for result in results), "a rank ended without a result"
        return [result[0] for result in results]


def _rank(
    folder: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage: not among all that was imported
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS // 2),
        )
        result = function(*args)
        dist.barrier()
        torch.save((result,), os.path.join(folder, f"result{rank}"))
        dist.destroy_process_group()
    except BaseException:
        torch.save(f"rank {rank}: {traceback.format_exc()}", f"{folder}/failure{rank}")
    finally:
        os._exit(0)  # gloo's threads must not outlive the group they wait for


def _read(folder: str, what: str, rank: int) -> Any:
    path = os.path.join(folder, f"{what}{rank}")
    return torch.load(path, weights_only=False) if os.path.exists(path) else None
