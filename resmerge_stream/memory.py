"""How many bytes a merge needs at most: the model that the plan promises and refuses by.

Numbers without torch: measured constants (docs/performance.md) and counts of elements.
"""

# Up to this short side a dense SVD costs less than Lanczos steps, in time and in memory.
DENSE_UP_TO = 96
# Above this short side the float64 Gram matrix of the fallback would dominate the memory.
GRAM_UP_TO = 1024
# Up to this short side the factors of a whole SVD are kept in float64: whitening nearly collinear
# directions of several experts enlarges float32's noise by the inverse of their distance.
DOUBLE_UP_TO = 2048

# Private memory of the process once torch is imported and has worked: interpreter, libraries,
# threads, allocator slack, headers, small files; and compiling the loops, which the first merge on
# a machine does (30 MB).
FIXED_BYTES = 225_000_000
# Room beside the largest matrix for others that are decided at the same time.
SPARE_BYTES = 90_000_000
# Elements of one row block; also the step of `task_vectors`. Smaller ones hand Python's lock over
# oftener than they compute, larger ones leave the cache: `mean` of the 0.5B group took 2.36 s with
# 2^16, 1.75 with 2^18; 2^19 was 5 % faster, slower for TIES, and 20 to 50 MB more.
BLOCK_ELEMENTS = 1 << 18
# A sum over rows is cut into so many parts at most, of so many rows at least, for cores that help.
PARTS, PART_ROWS = 8, 128
# So many of them are one block of a GPU, which waits for the host after each.
DEVICE_BLOCKS = 16
# The largest temporary of a row block, in float64, and a little more: what is freed up to this size
# is kept for the next block, what is larger is given back at once.
KEPT_BUFFER_BYTES = 4 << 20
# Likewise of a matrix's factors where the result is an adapter: the kernel took as long to hand
# such buffers out anew as the arithmetic takes. glibc allows no more.
KEPT_FACTOR_BYTES = 32 << 20
# Memory of merged bytes that were written is kept for the next, so much of it.
KEPT_OUTPUT_BYTES = 18_000_000
# A tensor merged by rows is read in ranges of about this many output bytes a source.
PIECE_BYTES = 8_000_000
# A tensor that is merged by rows but decided whole is held when its output is not larger than this.
HELD_BYTES = 24_000_000
# Bytes that are read ahead from the Hub, beside what is being merged. From a folder pages are
# mapped, which is no private memory.
HUB_WINDOW_BYTES = 192_000_000
LEAST_HUB_WINDOW_BYTES = 16_000_000
# Bytes that may wait for the disk.
WRITE_QUEUE_BYTES = 24_000_000
# What hf_xet takes to send files or streams: at most, at first, and for each byte of a small model.
# 52, 156, 335, 368 and 413 MB were seen for 16, 64, 128, 256 and 1,000 MB.
_XET_BYTES, _XET_START, _XET_SHARE = 420_000_000, 20_000_000, 2.7


def block_bytes(experts: int, m: int, n: int) -> int:
    """Return bytes of one row block's temporaries: N deltas and about six float32 copies.

    A row that is longer than a block is one, and what it becomes waits whole: four copies more.
    """
    elements = min(m * n, max(BLOCK_ELEMENTS, n))
    return 4 * ((experts + 6) * elements + 4 * max(elements - BLOCK_ELEMENTS, 0))


def gram_bytes(m: int, n: int, rank: int) -> int:
    """Return bytes of the fallback's float64 Gram matrix, its eigenvectors and LAPACK's room.

    One at a time, whatever the number of threads.
    """
    short = min(m, n)
    return 32 * short * short if max(DENSE_UP_TO, 4 * rank) < short <= GRAM_UP_TO else 0


def solver_bytes(m: int, n: int, rank: int, solver: str, count: int = 1) -> int:
    """Return bytes that finding the top `rank` triplets of m × n matrices takes at most.

    Args:
        m, n: shape.
        rank: k.
        solver: as the methods name it. Where asked for dense ones, one matrix has its turn.
        count: of matrices.
    """
    short = min(m, n)
    if solver == "dense":
        return 8 * m * n * 3
    if short <= max(DENSE_UP_TO, 4 * rank):
        return 8 * m * n * 3 * count
    first = 8 + short // 6
    # Of noise, so many columns were seen: 65 for one direction, 208 for 4, 544 for 16.
    columns = min(18 + 48 * rank, short)
    rows = first // rank * rank or rank
    while rows < columns:
        rows *= 2  # with a copy of what was there
    longer = 6 * rows * short if rows > first else 4 * rows * short
    in_double = 8 * rows**2 + 16 * columns * short + 24 * columns**2
    return max(8 * first * short, longer + in_double) * count


def svd_bytes(m: int, n: int, count: int = 1) -> int:
    """Return bytes of `count` whole SVDs of m × n matrices that are kept, made one at a time.

    The factors of each; once the float64 Gram matrix, its eigenvectors and LAPACK's own room,
    and the longer factor in float64.
    """
    short, long = min(m, n), max(m, n)
    width = 8 if short <= DOUBLE_UP_TO else 4
    return count * width * (m + n) * short + 40 * short**2 + 12 * long * short


def sending_bytes(nbytes: int) -> int:
    """Return bytes that sending a model's weights to the Hub takes beside them."""
    return min(_XET_BYTES, _XET_START + int(_XET_SHARE * nbytes))


def krylov_bytes(m: int, n: int, rank: int, steps: int, count: int) -> int:
    """Return bytes that block Krylov steps take which find the heads of `count` m × n matrices.

    Bases, what Δᵀ makes of them, columns on their way, and sums of parts of the rows.
    """
    rank = min(rank, m, n)
    parts = min(max(m // PART_ROWS, 1), PARTS)
    return 8 * count * rank * ((steps + 3) * m + (steps + parts + 3) * n)
