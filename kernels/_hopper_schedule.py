"""Who computes what, and when, in Hopper's attention kernels: their thread blocks' tiles, and the order of sums of dQ.

Forward, thread blocks stay on their multiprocessor and take one tile of queries after the other: numbers dealt out in
turn, or, of packed sequences, whose tiles differ too much for that, drawn from a counter. Backward, each has one tile
of keys.
"""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ._hopper_tiles import KEYS, query_tiles
from .hopper import head_rows

# Integers as arguments of these kernels that are not to be specialised on.
SIZES = (
    *("heads", "kv_heads", "group", "n_queries", "n_keys", "window", "sequences", "query_places", "key_places"),
    *("n_heads", "section", "width"),
)


class Work(NamedTuple):
    """What is shared out: n_heads * n_tiles tiles of queries, n_heads counting all batches; see `place`. window, cap:
    None without. A tile of packed sequences is described by another one: its own sequence's lengths and first rows."""

    heads: gl.tensor
    group: gl.tensor
    n_queries: gl.tensor
    n_keys: gl.tensor
    n_heads: gl.tensor
    n_tiles: gl.tensor
    section: gl.tensor
    window: gl.tensor | None
    cap: gl.tensor | None
    first_query: gl.tensor | None
    first_key: gl.tensor | None


@gluon.jit
def item(step):
    """Number of the tile that this thread block takes in a step: forwards over the thread blocks in one step, backwards
    in the next, so that the one that gets the longest tile of a step gets the shortest after it."""
    n = gl.num_programs(0)
    p = gl.program_id(0)
    return step * n + gl.where(step % 2 == 1, n - 1 - p, p)


@gluon.jit
def steps(work):
    """How many tiles this thread block takes: the last step may not reach it."""
    whole = work.n_heads * work.n_tiles // gl.num_programs(0)
    return whole + (item(whole) < work.n_heads * work.n_tiles).to(gl.int32)


@gluon.jit
def place(number, work, CAUSAL: gl.constexpr):
    """(batch, head, tile) of a number. Causal: sections of heads whose keys fit the L2 cache together, in each the
    longest tiles of all its heads first; else head by head."""
    if CAUSAL:
        first = number // (work.section * work.n_tiles) * work.section
        size = gl.minimum(work.section, work.n_heads - first)
        number -= first * work.n_tiles
        bh = first + number % size
        tile = work.n_tiles - 1 - number // size
    else:
        bh = number // work.n_tiles
        tile = number % work.n_tiles
    return bh // work.heads, bh % work.heads, tile


class Packed(NamedTuple):
    """Packed sequences, or nothing: first rows (sequences + 1,) in global memory, and a counter there of the tiles that
    are taken. The loading warp takes them, and tells the others: head, tile, first query, queries, first key, keys of
    each. numbers: (2 * FIELDS, 1) in shared memory, for two tiles, each with barriers for "told" and "read"."""

    query_starts: gl.tensor | None
    key_starts: gl.tensor | None
    sequences: gl.tensor | None
    counter: gl.tensor | None
    numbers: gl.shared_memory_descriptor | None
    told: gl.shared_memory_descriptor | None
    read: gl.shared_memory_descriptor | None


FIELDS = gl.constexpr(6)


@gluon.jit
def draw(counter):
    """What the counter in global memory holds, which is then one more: in this warp's first lane, see `drawn`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.b32 $0, 0;"
        " @first atom.relaxed.gpu.global.add.s32 $0, [$1], 1; }",
        "=&r,l", [gl.zeros([1], gl.int64, layout=layout) + counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def drawn(ticket):
    """What `draw` gave, in all lanes. Apart from it, so that there is something to do while the counter answers."""
    everywhere = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [ticket], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.max(everywhere, 0)


@gluon.jit
def tell(packed, step, numbers):
    """The loading warp says which tile comes in a step; head -1 ends the work."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = step % 2
    mbarrier.wait(packed.read.index(slot), step // 2 % 2 ^ 1)
    for i in gl.static_range(FIELDS):
        packed.numbers.index(slot * FIELDS + i).store(gl.full([1], numbers[i], gl.int32, layout=layout))
    mbarrier.arrive(packed.told.index(slot), count=1)


@gluon.jit
def heard(packed, step, FIELD: gl.constexpr):
    """One of the numbers that were told of a step's tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(packed.numbers.index(step % 2 * FIELDS + FIELD).load(layout), 0)


class Sizes(NamedTuple):
    """Backward: what there is, see `part`. Of packed sequences, whose query tiles have query_places places in memory
    for each head, n_queries to first_key are those of this program's own; its query tiles begin at `first_place`, and
    head and key_tile are its part."""

    kv_heads: gl.tensor
    group: gl.tensor
    n_queries: gl.tensor
    n_keys: gl.tensor
    width: gl.tensor
    window: gl.tensor | None
    first_query: gl.tensor | None
    first_key: gl.tensor | None
    query_places: gl.tensor | None
    first_place: gl.tensor | None
    head: gl.tensor | None
    key_tile: gl.tensor | None


@gluon.jit
def side_by_side(key_tiles, width, CAUSAL: gl.constexpr):
    """This program's head among all batches', first + place % width, and its key tile: (first, place, width, tile)."""
    first_head = gl.program_id(0) // (width * key_tiles) * width
    width = gl.minimum(width, gl.num_programs(0) // key_tiles - first_head)
    place = gl.program_id(0) - first_head * key_tiles
    key_tile = place // width
    if CAUSAL:
        key_tile = key_tiles - 1 - key_tile
    return first_head, place, width, key_tile


@gluon.jit
def part(sizes, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """This program's part: batch and key head, key tile, the query tiles [first, end) that see a key of it, its number
    of steps over these tiles of all heads of the group, and whether there are any. If not, which windows and packed
    sequences alone lead to, it takes one step, over query tile 0, in which all is masked, and adds nothing.

    A key tile's dQ is added after that of programs earlier in the grid, and those start earlier: what a program waits
    for is always running. `width` heads run side by side, because tiles of one head follow each other at a distance.
    Causal key tiles start with the last: if they start together, each comes to a query tile when the next has left it.

    Windows change nothing in this: the key tiles that a query tile sees follow each other without a gap, and each of
    them walks it, so that from the last one on every turn is taken once, by a program later in the grid than the one
    before it. Packed sequences are tiles of one head in a row: turns are those of a sequence, in which the order in the
    grid is as it is for one alone, and a tile beyond the sequence's end takes none.
    """
    PACKED: gl.constexpr = sizes.key_tile is not None
    key_tiles = gl.cdiv(sizes.n_keys, KEYS)
    tiles = gl.cdiv(sizes.n_queries, QUERIES)
    if PACKED:
        first_head, place, width, key_tile = sizes.head, 0, 1, sizes.key_tile
    else:
        first_head, place, width, key_tile = side_by_side(key_tiles, sizes.width, CAUSAL)
    first, end = query_tiles(
        key_tile * KEYS, tiles, sizes.n_queries, sizes.n_keys, sizes.window, QUERIES, CAUSAL, PACKED
    )  # fmt: skip
    seen = first < end
    if PACKED or sizes.window is not None:
        first = gl.where(seen, first, 0)
        end = gl.where(seen, end, 1)
        steps = gl.where(seen, sizes.group * (end - first), 1)
    else:
        # The last query sees every key: there is always a step.
        steps = sizes.group * (end - first)
    # Told that there is a step, the compiler needs fewer registers.
    steps = gl.maximum(steps, 1)
    return first_head + place % width, key_tile, first, end, steps, seen


@gluon.jit
def next_tile(tile, head, first, end):
    """The query tile after this one, in the same head or the group's next."""
    last = tile + 1 == end
    return gl.where(last, first, tile + 1), gl.where(last, head + 1, head)


@gluon.jit
def stored(head, tile, sizes, QUERIES: gl.constexpr):
    """The number of a query tile in memory."""
    if sizes.key_tile is not None:
        return head * sizes.query_places + sizes.first_place + tile
    else:
        return head * gl.cdiv(sizes.n_queries, QUERIES) + tile


@gluon.jit
def queries_at(b, h, row, sizes):
    """Coordinates of a tile of queries in a (B, T, H, D) tensor, for Work and for Sizes."""
    return head_rows(b, h, row, sizes.first_query, sizes.n_queries, sizes.first_query is not None)


@gluon.jit
def keys_at(b, h, row, sizes):
    return head_rows(b, h, row, sizes.first_key, sizes.n_keys, sizes.first_key is not None)


@gluon.jit
def wait_turn(turn, number):
    """Wait until the int32 at address `turn` in global memory is `number`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred other; .reg .b32 now; again: ld.acquire.gpu.global.b32 now, [$1]; setp.ne.s32 other, now, $2;"
        " @other bra.uni again; fence.proxy.async; mov.b32 $0, now; }",
        "=r,l,r",
        [gl.zeros([32], gl.int64, layout=layout) + turn.to(gl.int64), gl.zeros([32], gl.int32, layout=layout) + number],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def end_turn(turn):
    """Add 1 to the int32 at address `turn` once what this warp's TMA has written is in global memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred first; cp.async.bulk.wait_group 0; fence.proxy.async; bar.warp.sync -1; setp.eq.s32 first, $2, 0;"
        " @first red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, $2; }",
        "=r,l,r",
        [gl.zeros([32], gl.int64, layout=layout) + turn.to(gl.int64), gl.arange(0, 32, layout=layout)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
