"""Block geometry against brute force: every number is an integer that knows its place in the line.

No processes: a rank is a coordinate in a mesh, and its memory is cut out of `torch.arange`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from amsf_dist.blocks import Blocks
from amsf_dist.kernels.lines import flat_line, put_back
from amsf_dist.shards.flat import FlatSlice, flat_layout
from amsf_dist.shards.fsdp2 import cut_mesh_dims, fsdp2, on_paper
from amsf_dist.shards.layout import Axis, Layout, Part
from amsf_dist.shards.replicated import replicated
from amsf_dist.shards.runs import Run, box_runs, interval_boxes, local_blocks
from amsf_dist.shards.vector import line_shape, vector_shape

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def quick(examples: int) -> Any:
    return settings(deadline=None, max_examples=examples)  # busy machines are not slow code


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0] or [1]


def line_of(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape)).view(tuple(shape))


def blocks_here(runs: Sequence[Run]) -> list[int]:
    """The block of every number of the memory, from the sections, which must cover it in order."""
    blocks: list[int] = []
    for run in runs:
        assert run.numel > 0 and run.offset == len(blocks)
        touched = []
        for section in run.sections():
            assert section.start == len(blocks) < section.stop
            numel, rest = divmod(section.stop - section.start, section.num_blocks)
            assert rest == 0
            touched += range(section.first_block, section.first_block + section.num_blocks)
            blocks += [block for block in touched[-section.num_blocks :] for _ in range(numel)]
        assert len(blocks) == run.offset + run.numel
        assert touched == list(range(run.first_block, run.first_block + run.num_blocks))
    return blocks


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(SHAPES)
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    block_numel = draw(st.sampled_from(divisors(math.prod(shape))))
    return shape, [a for a, _ in ends], [b - a for a, b in ends], block_numel


@quick(150)
@given(boxes())
def test_the_sections_of_a_box_name_the_block_of_every_number_in_it(box: tuple[Any, ...]) -> None:
    shape, offsets, lengths, block_numel = box
    memory = line_of(shape)
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        memory = memory.narrow(dim, offset, length)
    line = memory.reshape(-1)
    runs = box_runs(shape, offsets, lengths, block_numel)
    assert blocks_here(runs) == (line // block_numel).tolist()
    for run in runs:
        assert run.whole == all(
            int((line[run.offset : run.offset + run.numel] // block_numel == block).sum())
            == run.block_numel
            for block in range(run.first_block, run.first_block + run.num_blocks)
        )


@quick(120)
@given(block_numel=st.integers(1, 12), num_blocks=st.integers(0, 6), data=st.data())
def test_an_interval_is_one_run(block_numel: int, num_blocks: int, data: st.DataObject) -> None:
    numel = block_numel * num_blocks
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    runs = box_runs([numel], [start], [stop - start], block_numel)
    assert len(runs) == int(stop > start)
    assert blocks_here(runs) == [number // block_numel for number in range(start, stop)]
    for run in runs:
        assert (run.phase, run.block_numel) == (start % block_numel, block_numel)
        assert run.whole == (start % block_numel == stop % block_numel == 0)


@quick(120)
@given(boxes())
def test_a_box_that_holds_its_outer_dims_whole_needs_no_more_runs_than_rows(
    box: tuple[Any, ...],
) -> None:
    """Runs cost a loop in every step: whole tensors must be one, boxes one per outer row."""
    shape, offsets, lengths, block_numel = box
    runs = box_runs(shape, offsets, lengths, block_numel)
    assert len(runs) <= math.prod(lengths[:-1])
    whole = box_runs(shape, [0] * len(shape), shape, block_numel)
    assert len(whole) == int(math.prod(shape) > 0)


@quick(100)
@given(boxes())
def test_blocks_counted_in_the_whole_vector_are_counted_as_before(box: tuple[Any, ...]) -> None:
    shape, offsets, lengths, block_numel = box
    num_blocks = math.prod(shape) // block_numel
    runs = box_runs(shape, offsets, lengths, block_numel)
    joined = local_blocks(runs, (num_blocks,), (0,), (num_blocks,))
    assert blocks_here(joined) == blocks_here(runs)
    assert len(joined) <= len(runs)


# The block vector -------------------------------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn, *, size: int = 7, min_dims: int = 1, transposed: bool = True) -> Part:
    """A parameter and blocks as the rules make them: of every kind, in any order of dims."""
    line = draw(st.lists(st.integers(1, size), min_size=min_dims, max_size=4))
    order = draw(st.none() | st.permutations(range(len(line))).map(tuple)) if transposed else None
    kind = draw(st.sampled_from(["element", "row", "groups", "head", "tensor"]))
    if kind == "element":
        order = None  # elements need no order, and the rules give none
        size = 1
    elif kind == "row":  # of a matrix, of each of a stack of matrices
        size = math.prod(line[draw(st.integers(1, max(len(line) - 1, 1))) :])
    elif kind == "groups":  # rows of a transposed convolution in groups: some per index of dim 0
        size, kind = draw(st.sampled_from(divisors(math.prod(line[1:])))), "row"
    elif kind == "head":
        size = draw(st.sampled_from(divisors(line[0]))) * math.prod(line[1:])
    else:
        size = math.prod(line)
    shape = list(line)
    for position, dim in enumerate(order or ()):
        shape[dim] = line[position]
    return Part("w", tuple(shape), Blocks(kind, size, order))


@quick(120)
@given(parts())
def test_the_vector_has_the_leading_dims_where_a_block_is_what_remains(part: Part) -> None:
    line, vector = line_shape(part.shape, part.blocks), vector_shape(part.shape, part.blocks)
    assert math.prod(vector) == part.num_blocks
    leading = [line[:dims] for dims in range(1, len(line)) if vector == line[:dims]]
    assert vector == line or leading or vector == (part.num_blocks,)
    order = part.blocks.order or range(len(line))
    assert tuple(line_of(part.shape).permute(tuple(order)).shape) == line


@quick(100)
@given(parts())
def test_a_whole_parameter_is_one_run(part: Part) -> None:
    (piece,) = replicated(part).pieces
    assert len(piece.runs) == 1 and piece.runs[0].whole
    numbers = torch.arange(math.prod(part.shape)) // part.blocks.block_numel
    assert blocks_here(piece.runs) == numbers.tolist()


# DTensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """As much of a DeviceMesh as geometry needs, seen from one rank."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    device_type: str = "cpu"

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def get_coordinate(self) -> list[int]:
        return list(self.coordinate)

    @property
    def mesh(self) -> Tensor:
        return torch.arange(math.prod(self.shape)).view(self.shape)

    def get_group(self, dim: int) -> tuple[int, ...]:
        here = [slice(None) if d == dim else at for d, at in enumerate(self.coordinate)]
        return tuple(self.mesh[tuple(here)].tolist())


@pytest.fixture(autouse=True, scope="module")
def groups_are_the_ranks_in_them() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[fsdp2.__module__]  # the package has a function of the same name
        patch.setattr(module, "_group_of", lambda ranks, world: ranks)
        yield


@dataclass(frozen=True)
class Sharded:
    """As much of a DTensor: its place, and this rank's memory."""

    device_mesh: Mesh
    placements: tuple[Placement, ...]
    local: Tensor

    def to_local(self) -> Tensor:
        return self.local


@dataclass(frozen=True)
class Setting:
    """A parameter on a mesh."""

    part: Part
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    def ranks(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.mesh))

    def memory(self, whole: Tensor, coordinate: Sequence[int], placements: Any = None) -> Tensor:
        """What a rank holds of a tensor: tensor parallel cuts, then FSDP cuts what is left."""
        placements = placements or self.placements
        strided = [dim for dim, p in enumerate(placements) if isinstance(p, _StridedShard)]
        for dim in [d for d in range(len(self.mesh)) if d not in strided] + strided:
            if not isinstance(placements[dim], Replicate):
                whole = chunk(whole, self.mesh[dim], placements[dim].dim, coordinate[dim])
        return whole

    def layout(self, coordinate: tuple[int, ...]) -> Layout:
        param: Any = Sharded(
            Mesh(self.mesh, coordinate),
            self.placements,
            self.memory(line_of(self.part.shape), coordinate),
        )
        return fsdp2(self.part, param)

    @property
    def in_line_order(self) -> tuple[Placement, ...]:
        order = self.part.blocks.order or tuple(range(len(self.part.shape)))
        return tuple(
            p if isinstance(p, Replicate) else on_dim(p, order.index(p.dim))
            for p in self.placements
        )

    @property
    def cut(self) -> tuple[int, ...]:
        line = line_shape(self.part.shape, self.part.blocks)
        return cut_mesh_dims(line, self.mesh, self.in_line_order, self.part.blocks)

    def vector_here(self, coordinate: Sequence[int]) -> Tensor:
        """Global numbers of the blocks whose moments this rank keeps, cut as the parameter is."""
        vector = line_of(vector_shape(self.part.shape, self.part.blocks))
        placements = [
            Replicate() if dim in self.cut or self.mesh[dim] == 1 else placement
            for dim, placement in enumerate(self.in_line_order)
        ]
        return self.memory(vector, coordinate, placements).reshape(-1)

    def line_here(self, coordinate: Sequence[int]) -> Tensor:
        """Places in the line of the numbers here, in the order of the memory's line."""
        order = self.part.blocks.order or tuple(range(len(self.part.shape)))
        line = line_of(line_shape(self.part.shape, self.part.blocks))
        stored = line.permute([order.index(dim) for dim in range(line.dim())])
        assert tuple(stored.shape) == self.part.shape
        return self.memory(stored, coordinate).permute(order).reshape(-1)


def on_dim(placement: Any, dim: int) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def chunk(whole: Tensor, count: int, dim: int, index: int) -> Tensor:
    """torch.chunk, and an empty one where it gives fewer."""
    chunks = whole.chunk(count, dim) if whole.shape[dim] else ()
    return chunks[index] if index < len(chunks) else whole.narrow(dim, 0, 0)


@st.composite
def settings_on_meshes(draw: st.DrawFn) -> Setting:
    part = draw(parts(size=draw(st.sampled_from([4, 7, 12]))))
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (4,), (7,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]))
    kind = draw(st.sampled_from(["any", "first dim", "fsdp of tensor parallel"]))
    dims = st.integers(0, len(part.shape) - 1)
    if kind == "first dim":
        first = part.blocks.order[0] if part.blocks.order else 0
        placements = [Shard(first) for _ in mesh]
    elif kind == "fsdp of tensor parallel" and len(mesh) == 2:
        dim = draw(dims)
        placements = [_StridedShard(dim, split_factor=mesh[1]), Shard(dim)]
    else:
        choices = st.just(Replicate()) | dims.map(Shard)
        placements = [draw(choices) for _ in mesh]
    return Setting(part, mesh, tuple(placements))


@quick(120)
@given(settings_on_meshes())
def test_every_rank_knows_the_block_of_every_number_it_holds(setting: Setting) -> None:
    seen = torch.zeros(math.prod(setting.part.shape), dtype=torch.int64)
    for rank in setting.ranks():
        (piece,) = setting.layout(rank).pieces
        vector, line = setting.vector_here(rank), setting.line_here(rank)
        assert piece.num_blocks == vector.numel()
        local = torch.tensor(blocks_here(piece.runs), dtype=torch.int64)
        assert local.numel() == line.numel() == piece.numel
        assert torch.equal(vector[local], line // setting.part.blocks.block_numel)
        seen[line] += 1
    copies = math.prod(
        n for n, p in zip(setting.mesh, setting.placements, strict=True) if isinstance(p, Replicate)
    )
    assert (seen == copies).all()


@quick(120)
@given(settings_on_meshes(), st.integers(0, 2**31))
def test_sums_added_over_the_cut_mesh_dims_are_the_sums_of_the_whole(
    setting: Setting, seed: int
) -> None:
    numel = math.prod(setting.part.shape)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 9, (numel,), generator=generator)
    whole = values.view(-1, setting.part.blocks.block_numel).sum(1)
    ranks = list(setting.ranks())
    layouts = [setting.layout(rank) for rank in ranks]
    sums = []
    for rank, layout in zip(ranks, layouts, strict=True):
        here = torch.zeros(layout.num_blocks, dtype=torch.int64)
        line = setting.line_here(rank)
        for section in (s for piece in layout.pieces for r in piece.runs for s in r.sections()):
            part = values[line[section.start : section.stop]].view(section.num_blocks, -1)
            here[section.first_block : section.first_block + section.num_blocks] += part.sum(1)
        sums.append(here)
    for number in range(len(setting.cut)):
        axes = [layout.cuts[number].axis for layout in layouts]
        totals = []
        for rank, axis in enumerate(axes):
            assert rank in axis.group and len(axis.group) == axis.size
            assert all(axes[other] == axis for other in axis.group)
            total = sum(sums[other] for other in axis.group)
            assert isinstance(total, Tensor) and not (total % axis.replicas).any()
            totals.append(total // axis.replicas)
        sums = totals
    for rank, layout, here in zip(ranks, layouts, sums, strict=True):
        assert len(layout.cuts) == len(setting.cut)
        assert torch.equal(here, whole[setting.vector_here(rank)])


@quick(120)
@given(settings_on_meshes())
def test_no_mesh_dim_is_cut_exactly_when_every_block_is_whole_on_every_rank(
    setting: Setting,
) -> None:
    size = setting.part.blocks.block_numel
    whole = all(
        (torch.bincount(setting.line_here(rank) // size, minlength=1) % size == 0).all()
        for rank in setting.ranks()
    )
    if not setting.cut:
        assert whole
        assert all(r.whole for rank in setting.ranks() for r in setting.layout(rank).pieces[0].runs)
    elif whole:  # ranks agree without need in two cases
        line = line_shape(setting.part.shape, setting.part.blocks)
        vector = vector_shape(setting.part.shape, setting.part.blocks)
        # A dim of one number: the ranks without it keep its moments too, and so must be told.
        of_one = all(line[setting.in_line_order[dim].dim] == 1 for dim in setting.cut)
        # Several rows per index of dim 0: their vector has no such dim to be sharded by.
        groups = vector == (setting.part.num_blocks,) and size < math.prod(line[1:])
        assert of_one or groups


@quick(80)
@given(settings_on_meshes())
def test_on_paper_it_looks_as_on_the_first_rank(setting: Setting) -> None:
    (paper,) = on_paper(setting.part, setting.mesh, setting.placements).pieces
    (first,) = setting.layout((0,) * len(setting.mesh)).pieces
    assert paper == first


# 10 rows in heads of 2: 4, 4 and 2 rows, and the last rank's 2 are cut once more. 7 rows: what
# torch 2.13 takes for their 2 x 3 strided shards is not what fully_shard puts there.
@example(Setting(Part("w", (10, 3), Blocks("head", 6)), (3, 2), (Shard(0), Shard(0))))
@example(
    Setting(
        Part("w", (10, 3), Blocks("head", 6)), (2, 3), (_StridedShard(0, split_factor=3), Shard(0))
    )
)
@example(
    Setting(
        Part("w", (7, 3), Blocks("row", 3)), (3, 2), (_StridedShard(0, split_factor=2), Shard(0))
    )
)
@example(Setting(Part("w", (4, 3), Blocks("row", 3)), (2, 1), (Shard(0), Shard(1))))
@quick(1)
@given(settings_on_meshes())
def test_cases_that_once_went_wrong(setting: Setting) -> None:
    test_every_rank_knows_the_block_of_every_number_it_holds.hypothesis.inner_test(setting)
    test_sums_added_over_the_cut_mesh_dims_are_the_sums_of_the_whole.hypothesis.inner_test(
        setting, 0
    )


# Slices of flat parameters ----------------------------------------------------------------------


@st.composite
def flats(draw: st.DrawFn) -> tuple[list[Part], list[int], int]:
    """Parameters, numbers of padding before each (FSDP1 aligns them), and ranks."""
    inside = draw(st.lists(parts(size=4), min_size=1, max_size=4))
    padding = [draw(st.integers(0, 3)) for _ in inside]
    return inside, padding, draw(st.integers(1, 5))


@quick(120)
@given(flats(), st.integers(0, 2**31))
def test_slices_of_a_flat_parameter_agree_on_the_sums_of_the_whole(
    flat: tuple[list[Part], list[int], int], seed: int
) -> None:
    inside, padding, world_size = flat
    sizes = [math.prod(part.shape) for part in inside]
    starts = [sum(padding[: n + 1]) + sum(sizes[:n]) for n in range(len(inside))]
    length = -(-(starts[-1] + sizes[-1]) // world_size)
    values = torch.randint(
        -9, 9, (length * world_size,), generator=torch.Generator().manual_seed(seed)
    )
    expected = [
        in_line_order(values[start : start + size], part).view(-1, part.blocks.block_numel).sum(1)
        for part, start, size in zip(inside, starts, sizes, strict=True)
    ]

    seen = torch.zeros_like(values)
    layouts, sums, payload = [], [], None
    for rank in range(world_size):
        layout = flat_layout(inside, slices(inside, starts, length, rank, world_size))
        memory = values[rank * length : (rank + 1) * length]
        here = torch.zeros(layout.num_blocks, dtype=torch.int64)
        counted = seen[rank * length : (rank + 1) * length]
        for piece in layout.pieces:
            line, count = flat_line(memory, piece), flat_line(counted, piece)
            for section in (s for run in piece.runs for s in run.sections()):
                part = line[section.start : section.stop].view(section.num_blocks, -1)
                here[section.first_block : section.first_block + section.num_blocks] += part.sum(1)
                count[section.start : section.stop] += 1
            put_back(counted, piece, count)
        layouts.append(layout)
        sums.append(here)
    for start, size in zip(starts, sizes, strict=True):
        assert (seen[start : start + size] == 1).all()
        seen[start : start + size] = 0
    assert not seen.any()  # padding belongs to nobody

    num_slots = {sum(cut.num_slots for cut in layout.cuts) for layout in layouts}
    assert len(num_slots) == 1  # every rank sends as many floats
    payload = torch.zeros(num_slots.pop(), dtype=torch.int64)
    for layout, here in zip(layouts, sums, strict=True):
        for cut in layout.cuts:
            payload[list(cut.slots)] += here[blocks_of_sums(layout, cut.sums)]
    for rank, (layout, here) in enumerate(zip(layouts, sums, strict=True)):
        for cut in layout.cuts:
            here[blocks_of_sums(layout, cut.sums)] = payload[list(cut.slots)]
        for piece, start, total in zip(layout.pieces, starts, expected, strict=True):
            first = max(rank * length - start, 0) // piece.part.blocks.block_numel
            first = 0 if piece.boxes else first  # all its blocks
            mine = here[piece.first_block : piece.first_block + piece.num_blocks]
            assert torch.equal(mine, total[first : first + piece.num_blocks])


def in_line_order(values: torch.Tensor, part: Part) -> torch.Tensor:
    order = part.blocks.order
    return values if order is None else values.view(part.shape).permute(order).reshape(-1)


@quick(200)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_an_interval_is_a_few_boxes_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = torch.arange(numel).view(shape)
    boxes = list(interval_boxes(shape, start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    seen = [
        numbers[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))].flatten()
        for offsets, lengths in boxes
    ]
    assert all(math.prod(lengths) for _, lengths in boxes)
    found = torch.cat(seen) if seen else numbers.flatten()[:0]
    assert torch.equal(found, torch.arange(start, stop))


def blocks_of_sums(layout: Layout, sums: Sequence[int]) -> list[int]:
    """Places in the block vector: element blocks have one sum together, and are never cut."""
    places = {
        piece.first_sum + index: piece.first_block + index
        for piece in layout.pieces
        if not piece.part.elementwise
        for index in range(piece.num_blocks)
    }
    return [places[index] for index in sums]


def slices(
    inside: list[Part], starts: list[int], length: int, rank: int, world_size: int
) -> list[FlatSlice]:
    here = []
    for part, start in zip(inside, starts, strict=True):
        numel = math.prod(part.shape)
        begin = min(max(rank * length - start, 0), numel)
        end = max(min((rank + 1) * length - start, numel), begin)
        here.append(
            FlatSlice(
                name=part.name,
                shape=part.shape,
                offset=max(start - rank * length, 0) if end > begin else 0,
                start=begin,
                stop=end,
                boundaries=tuple(
                    n * length - start for n in range(world_size) if 0 < n * length - start < numel
                ),
                axis=Axis(None, world_size, "cpu"),
            )
        )
    return here
