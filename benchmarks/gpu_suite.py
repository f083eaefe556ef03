"""Check and measure everything on one GPU, in one go: one table, and the same as JSON.

    python benchmarks/gpu_suite.py [--json FILE]           # under 8 minutes, no network
    python benchmarks/gpu_suite.py --device cpu --small    # the same code in Triton's interpreter

On a CPU it shows that the script works; its times say nothing. Peers that are not installed
(schedulefree, flashoptim) are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ARGUMENTS = argparse.ArgumentParser(description=__doc__.splitlines()[0])
ARGUMENTS.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
ARGUMENTS.add_argument("--small", action="store_true", help="tiny tensors")
ARGUMENTS.add_argument("--json", metavar="FILE", help="write the table there too")
ARGS = ARGUMENTS.parse_args()
if ARGS.device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from amsf_dist import AMSF  # noqa: E402
from amsf_dist.kernels.choice import AMSF_KERNEL  # noqa: E402
from amsf_dist.kernels.triton.stepper import TritonKernel  # noqa: E402
from amsf_dist.kernels.triton.tables import Programs  # noqa: E402

DEVICE, SMALL = torch.device(ARGS.device), ARGS.small
GPU = DEVICE.type == "cuda"
DIM, HIDDEN, VOCAB, LAYERS = (16, 48, 40, 1) if SMALL else (2048, 8192, 32000, 15)
ROUNDS = 1 if SMALL else 20
# setting -> (dtype, options, bytes per parameter that a step moves: the gradient is read twice, and
# once more where factored)
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "fp32": (torch.float32, {}, 2 * 4 + 2 * 4 + 2 * 4),
    "5.06": (torch.bfloat16, {"state_storage": "bf16"}, 2 * 2 + 2 * 3 + 2 * 2),
    "4.06": (torch.bfloat16, {"state_storage": "int8"}, 2 * 2 + 2 * 3 + 2 * (1 + 2 / 64)),
    "4.06, factored": (
        torch.bfloat16,
        {"state_storage": "int8", "blocks": "factored"},
        3 * 2 + 2 * 3 + 2 * (1 + 2 / 64),
    ),
    "3.06": (
        torch.bfloat16,
        {"state_storage": "int8", "weight_storage": "stochastic"},
        2 * 2 + 2 * 2 + 2 * (1 + 2 / 64),
    ),
}
BLOCKS = [
    ("row", "schedule_free"),
    ("element", "ema"),
    ("tensor", "ema"),
    ("factored", "schedule_free"),
]
ROWS: list[dict[str, Any]] = []


def tell(part: str, what: str, value: float | str, unit: str = "", goal: str = "") -> None:
    """One row of the table, at once: a run that is cut off has shown what it had."""
    ROWS.append({"part": part, "what": what, "value": value, "unit": unit, "goal": goal})
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    print(f"| {part:<9} | {what:<44} | {shown:>10} {unit:<9} | {goal:<24} |", flush=True)


@contextmanager
def kernel(name: str) -> Iterator[None]:
    before = os.environ.get(AMSF_KERNEL)
    os.environ[AMSF_KERNEL] = name
    yield
    os.environ.pop(AMSF_KERNEL)
    if before is not None:
        os.environ[AMSF_KERNEL] = before


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median time of one call."""
    for _ in range(1 if SMALL else 3):
        run()
    times = []
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def shapes() -> list[tuple[int, ...]]:
    """Of a decoder of 1.04 billion parameters."""
    layer = [(DIM, DIM), (DIM // 4, DIM), (DIM // 4, DIM), (DIM, DIM)]
    layer += [(HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN), (DIM,), (DIM,)]
    return [(VOCAB, DIM), *(layer * LAYERS), (DIM,), (VOCAB, DIM)]


def params(dtype: torch.dtype, exact: bool = False) -> list[nn.Parameter]:
    """Parameters that have gradients; exact: of few bits, whose squares add up without rounding."""
    torch.manual_seed(0)
    made = []
    for shape in shapes() if not exact else [(64, 192), (33, 130), (7,), (1000,), (12, 4096)]:
        param = nn.Parameter((torch.randn(shape, device=DEVICE) * 0.02).to(dtype))
        noise = torch.randint(-15, 16, shape, device=DEVICE) / 64 if exact else None
        param.grad = (torch.randn_like(param) * 1e-3 if noise is None else noise).to(dtype)
        made.append(param)
    return made


def stepped(name: str, dtype: torch.dtype, steps: int, **options: Any) -> tuple[Any, Any]:
    with kernel(name):
        those = params(dtype, exact=True)
        optimizer = AMSF(those, lr=0.01, weight_decay=0.1, **options)
        for _ in range(steps):
            optimizer.step()
    return those, optimizer


def check() -> None:
    """Triton beside the reference, on this device, over every storage."""
    weights = ("native", "bf16+8", "bf16+16", "kahan", "stochastic")
    cases = [(torch.float32, "native", line) for line in ("fp32", "bf16", "int8")]
    cases += [
        (dtype, weight, line)
        for dtype in (torch.bfloat16, torch.float16)
        for weight in weights
        for line in ("fp32", "bf16", "int8")
    ]
    for dtype, weight, line in cases[::11] if SMALL else cases:
        worst, differing, numel = 0.0, 0, 0
        for blocks, averaging in BLOCKS:
            options = {"blocks": blocks, "averaging": averaging}
            options.update(weight_storage=weight, state_storage=line)
            ours, theirs = (stepped(k, dtype, 2, **options) for k in ("triton", "reference"))
            for one, other in zip(ours[0], theirs[0], strict=True):
                a, b = one.detach().double(), other.detach().double()
                worst = max(worst, float((a - b).norm() / b.norm()))
                differing, numel = differing + int((a != b).sum()), numel + a.numel()
        name = f"{str(dtype)[6:]} {weight} / {line}"
        bound = 1e-6 if dtype == torch.float32 else 1e-3
        verdict = "" if worst <= bound else " FAILED"
        tell("check", f"{name}: relative difference", worst, "", f"<= {bound:.0e}{verdict}")
        tell("check", f"{name}: weights that differ", differing / numel, "")


def bandwidth() -> float:
    numel = 2**14 if SMALL else 2**30
    source = torch.ones(numel, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * numel / seconds(lambda: target.copy_(source)) / 1e9
    tell("copy", "bandwidth, read + written", rate, "GB/s")
    return rate


def ours(setting: str, **options: Any) -> tuple[list[nn.Parameter], AMSF]:
    dtype, chosen, _ = SETTINGS[setting]
    those = params(dtype)
    with kernel("triton"):
        return those, AMSF(those, lr=1e-4, **{**chosen, **options})


def peers() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What others need for a step, named by setting."""

    def fp32(make: Callable[[Sequence[Tensor]], Any]) -> Callable[[], Any]:
        return lambda: make(params(torch.float32))

    yield "AdamW(fused=True), fp32", fp32(lambda p: torch.optim.AdamW(p, fused=True))
    yield "AdamW(foreach=True), fp32", fp32(lambda p: torch.optim.AdamW(p, foreach=True))
    try:
        from schedulefree import AdamWScheduleFree

        def schedule_free(those: Sequence[Tensor]) -> Any:
            optimizer = AdamWScheduleFree(those)
            optimizer.train()
            return optimizer

        yield "AdamWScheduleFree, fp32", fp32(schedule_free)
    except ImportError:
        tell("step", "AdamWScheduleFree", "not here", "", "pip install schedulefree")
    try:
        from flashoptim import FlashAdamW

        yield "FlashAdamW, bf16", lambda: FlashAdamW(params(torch.bfloat16), lr=1e-4)
    except ImportError:
        tell("step", "FlashAdamW", "not here", "", "pip install flashoptim")


def step_times(copied: float) -> None:
    times = {}
    count = sum(p.numel() for p in params(torch.bfloat16))
    tell("step", "parameters", count / 1e9, "billion")
    for name, make in peers():
        try:
            optimizer = make()
            times[name] = seconds(optimizer.step)
            tell("step", name, times[name] * 1e3, "ms")
        except Exception as error:  # a peer's own trouble must not end the run
            tell("step", name, type(error).__name__, "", str(error)[:40])
        optimizer = None
    fused = times.get("AdamW(fused=True), fp32")
    for setting, (_, _, moved) in SETTINGS.items():
        _, optimizer = ours(setting)
        taken = seconds(optimizer.step)
        tell("step", f"AMSF {setting}", taken * 1e3, "ms")
        share = count * moved / taken / 1e9 / copied
        tell("step", f"AMSF {setting}: of copy bandwidth", 100 * share, "%", ">= 85 at 4.06")
        if fused:
            tell("step", f"AMSF {setting}: AdamW(fused) / AMSF", fused / taken, "x", ">= 2")
        del optimizer


def configurations() -> None:
    """Sizes of programs, on parameters of their own: a kernel in place may not run twice."""
    given = TritonKernel.programs
    for groups, warps in [(32, 4)] if SMALL else [(16, 2), (16, 4), (32, 4), (32, 8), (64, 8)]:
        TritonKernel.programs = Programs(groups=groups, warps=warps)
        for setting in ("fp32", "4.06"):
            _, optimizer = ours(setting)
            name = f"AMSF {setting}, {groups * 64} numbers, {warps} warps"
            tell("programs", name, seconds(optimizer.step, max(1, ROUNDS // 2)) * 1e3, "ms")
            del optimizer
    TritonKernel.programs = given


def memory() -> None:
    for setting in SETTINGS:
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if GPU else 0
        those, optimizer = ours(setting)
        optimizer.step()
        count = sum(p.numel() for p in those)
        said = optimizer.memory()["total"]
        tell("memory", f"AMSF {setting}: memory() per parameter", said / count, "bytes")
        if GPU:
            grads = sum(p.grad.numel() * p.grad.element_size() for p in those)
            peak = torch.cuda.max_memory_allocated() - before - grads
            tell("memory", f"AMSF {setting}: allocator's peak", peak / count, "bytes")
        del those, optimizer


def graph() -> None:
    """A captured step, replayed, beside the same steps without a graph."""
    if not GPU:
        tell("graph", "capture", "no GPU")
        return
    those, optimizer = stepped("triton", torch.bfloat16, 3, state_storage="int8")
    plain, _ = stepped("triton", torch.bfloat16, 7, state_storage="int8")
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        optimizer.step()
    for _ in range(4):
        captured.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(those, plain, strict=True))
    tell("graph", "4 replays equal 4 steps", "yes" if same else "no FAILED")


def sharded() -> None:
    """FSDP2 on one process."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = decoder().to(DEVICE, torch.bfloat16)
    alone = copy.deepcopy(model)
    mesh = dist.init_device_mesh(DEVICE.type, (1,))
    fully_shard(model, mesh=mesh)
    with kernel("triton"):
        optimizers = [AMSF(m, lr=1e-3, state_storage="int8") for m in (model, alone)]
        for one, optimizer in zip((model, alone), optimizers, strict=True):
            loss_of(one, 0).backward()
            optimizer.step()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    worst = max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)
    verdict = "" if worst <= 1e-3 else " FAILED"
    tell("fsdp2", "largest difference from one process", worst, "", f"<= 1e-3{verdict}")
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        mixed = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*mixed.unbind(), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.after(x))))


def decoder() -> nn.Module:
    dim, layers, vocab = (16, 1, 32) if SMALL else (1024, 12, 32000)
    torch.manual_seed(0)
    blocks = [Block(dim, dim // 16 if SMALL else dim // 64) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(vocab, dim), *blocks, nn.Linear(dim, vocab, bias=False))


def loss_of(model: nn.Module, step: int) -> Tensor:
    batch, length, vocab = (2, 8, 32) if SMALL else (8, 1024, 32000)
    generator = torch.Generator(DEVICE).manual_seed(step)
    tokens = torch.randint(vocab, (batch, length + 1), device=DEVICE, generator=generator)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def training() -> None:
    """Tokens per second, whole steps: AdamW on fp32 weights under autocast, AMSF on bf16."""
    rates = {}
    tokens = 16 if SMALL else 8192
    for name in ("AdamW(fused=True), autocast", "AMSF 4.06"):
        model = decoder().to(DEVICE)
        adamw = name.startswith("AdamW")
        if adamw:
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        else:
            model = model.to(torch.bfloat16)
            with kernel("triton"):
                optimizer = AMSF(model, lr=1e-4, state_storage="int8")

        def step(model: nn.Module = model, optimizer: Any = optimizer, cast: bool = adamw) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=cast):
                loss = loss_of(model, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        rates[name] = tokens / seconds(step)
        tell("training", name, rates[name], "tokens/s")
    adamw_rate, amsf_rate = rates.values()
    tell("training", "AMSF / AdamW", amsf_rate / adamw_rate, "x", ">= 1")


def main() -> int:
    if GPU and not torch.cuda.is_available():
        print("no CUDA device: run with --device cpu --small to check the script itself")
        return 1
    about = torch.cuda.get_device_name() if GPU else "CPU, interpreter: times say nothing"
    tell("machine", about, "", "")
    tell("machine", f"torch {torch.__version__}, triton {triton.__version__}", "")
    begin = time.perf_counter()
    copied = 0.0
    for part in (check, bandwidth, step_times, configurations, memory, graph, sharded, training):
        try:
            if part is bandwidth:
                copied = bandwidth()
            elif part is step_times:
                step_times(copied)
            else:
                part()
        except Exception as error:  # the other parts are still worth their time
            traceback.print_exc()
            tell(part.__name__, "stopped", "FAILED", "", f"{type(error).__name__}: {error}"[:60])
        if GPU:
            torch.cuda.empty_cache()
    tell("machine", "all of it", time.perf_counter() - begin, "s", "< 480")
    if ARGS.json:
        with open(ARGS.json, "w") as file:
            json.dump(ROWS, file, indent=1)
    return int(any("FAILED" in f"{row['value']} {row['goal']}" for row in ROWS))


if __name__ == "__main__":
    sys.exit(main())
