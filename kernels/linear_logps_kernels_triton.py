"""The Triton kernels of `linear_logps`; `linear_logps_triton` launches them.

Two products of a tile of `hidden` and a tile of `weight`, one that reads by pointers and one by tensor descriptors, and
two things to do with a tile of logits: `forward_*` sums it up, `backward_*` turns it into gradients by the logits. The
`*_gemm` kernels compute the tile, the `*_given` kernels read it from memory. Every output number is written by one
program, so there is nothing to add up between programs and nothing depends on their order.

Not here: any loop over the vocabulary (the grid is that), or the sums over tiles.
Letters: N rows, D width, V columns, which are the whole vocabulary or a slab of it. A tile is BLOCK_N rows by BLOCK_V
columns; a product runs over D in steps of BLOCK_D. Sums, exponentials and logits are float32.
"""

import triton
import triton.language as tl


@triton.jit
def forward_gemm(
    hidden,  # (N, D), a pointer or a descriptor of blocks (BLOCK_N, BLOCK_D)
    weight,  # (V, D), a pointer or a descriptor of blocks (BLOCK_V, BLOCK_D)
    bias,  # (V,) or None
    targets,  # (N,) int32 in the whole vocabulary
    maxima,  # (tiles, N) the largest logit of a row in a tile of columns
    others,  # (tiles, N) sum of exp(logit - maximum) over the tile without the target
    weighted,  # (tiles, N) sum of exp(logit - maximum) * (logit - maximum) over the same, or None
    target_logits,  # (N,) written where the target is one of the V columns
    kept,  # (N, whole tiles) logit - maximum of its row and tile, -inf at the target and past V, or None
    kept_stride,
    first_column,  # place of column 0 in the whole vocabulary
    N,
    V,
    D,
    scale,
    softcap,  # a number or None
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # D is a multiple of BLOCK_D
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row_tile, column_tile = _tile_of_program(N, V, BLOCK_N, BLOCK_V, GROUP)
    if DESCRIPTORS:
        product = _product_by_descriptors(hidden, weight, row_tile, column_tile, D, BLOCK_N, BLOCK_V, BLOCK_D)
    else:
        product = _product_by_pointers(
            hidden, weight, row_tile, column_tile, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_STEPS
        )
    logits = _logits(product, bias, column_tile, V, scale, softcap, BLOCK_V)
    _write_partials(
        logits, targets, maxima, others, weighted, target_logits, kept, kept_stride, first_column,
        row_tile, column_tile, N, V, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def forward_given(
    products,  # (N, V) float32: hidden @ weight.T
    products_stride,
    bias,
    targets,
    maxima,
    others,
    weighted,
    target_logits,
    kept,
    kept_stride,
    first_column,
    N,
    V,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """`forward_gemm` after its product."""
    row_tile, column_tile = _tile_of_program(N, V, BLOCK_N, BLOCK_V, 1)
    product = _load_tile(products, products_stride, row_tile, column_tile, N, V, BLOCK_N, BLOCK_V)
    logits = _logits(product, bias, column_tile, V, scale, softcap, BLOCK_V)
    _write_partials(
        logits, targets, maxima, others, weighted, target_logits, kept, kept_stride, first_column,
        row_tile, column_tile, N, V, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def backward_gemm(
    hidden,  # as in forward_gemm
    weight,
    bias,
    targets,
    centers,  # (N,) logit - center - log_sum is a log-probability
    log_sums,  # (N,)
    target_factors,  # (N,) the gradient at the target over the upstream gradient
    grads,  # (N,) upstream gradients
    by_logits,  # (N, whole tiles) output: the gradient by scale * hidden @ weight.T + bias, anything past V
    by_logits_stride,
    first_column,
    N,
    V,
    D,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row_tile, column_tile = _tile_of_program(N, V, BLOCK_N, BLOCK_V, GROUP)
    if DESCRIPTORS:
        product = _product_by_descriptors(hidden, weight, row_tile, column_tile, D, BLOCK_N, BLOCK_V, BLOCK_D)
    else:
        product = _product_by_pointers(
            hidden, weight, row_tile, column_tile, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_STEPS
        )
    logits = _logits(product, bias, column_tile, V, scale, softcap, BLOCK_V)
    distance = logits - _load_row(centers, row_tile, N, BLOCK_N)[:, None]
    _write_gradients(
        logits, distance, targets, log_sums, target_factors, grads, by_logits, by_logits_stride, first_column,
        row_tile, column_tile, N, softcap, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def backward_given(
    products,  # (N, V) float32: hidden @ weight.T; where `maxima` is given, what a forward kernel wrote as `kept`
    products_stride,
    maxima,  # None, or (tiles, N) as that kernel wrote them with the same BLOCK_V
    bias,
    targets,
    centers,
    log_sums,
    target_factors,
    grads,
    by_logits,  # may be `products` itself: a program reads its tile before it writes it
    by_logits_stride,
    first_column,
    N,
    V,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """`backward_gemm` after its product."""
    row_tile, column_tile = _tile_of_program(N, V, BLOCK_N, BLOCK_V, 1)
    tile = _load_tile(products, products_stride, row_tile, column_tile, N, V, BLOCK_N, BLOCK_V)
    center = _load_row(centers, row_tile, N, BLOCK_N)
    if maxima is None:
        logits = _logits(tile, bias, column_tile, V, scale, softcap, BLOCK_V)
        distance = logits - center[:, None]
    else:
        maximum = _finite_or_0(_load_row(maxima + column_tile.to(tl.int64) * N, row_tile, N, BLOCK_N))
        logits = tile + maximum[:, None]
        distance = tile + (maximum - center)[:, None]  # not through the larger logits, which would round it
    _write_gradients(
        logits, distance, targets, log_sums, target_factors, grads, by_logits, by_logits_stride, first_column,
        row_tile, column_tile, N, softcap, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _tile_of_program(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """This program's (row tile, column tile).

    Programs that run at the same time share a tile of the weight, and the GROUP row tiles they go round in stay in the
    cache, so that the weight is read from memory once for every GROUP row tiles.
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tl.cdiv(V, BLOCK_V)
    first_row_tile = program // in_group * GROUP
    group_rows = tl.minimum(row_tiles - first_row_tile, GROUP)
    place = program % in_group
    return first_row_tile + place % group_rows, place // group_rows


@triton.jit
def _product_by_pointers(
    hidden, weight, row_tile, column_tile, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_STEPS: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T of one tile, (BLOCK_N, BLOCK_V) float32. Past an edge a row repeats the last one."""
    inside = tl.arange(0, BLOCK_D)
    # the tile's first row is a 64-bit offset, what is added to it fits in 32 bits
    first_row = row_tile.to(tl.int64) * BLOCK_N
    first_column = column_tile.to(tl.int64) * BLOCK_V
    rows = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
    columns = tl.minimum(tl.arange(0, BLOCK_V), (V - 1 - first_column).to(tl.int32))
    left = hidden + first_row * D + (rows[:, None] * D + inside[None, :])
    right = weight + first_column * D + (columns[None, :] * D + inside[:, None])
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        if WHOLE_STEPS:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=inside[None, :] < D - start, other=0.0)
            b = tl.load(right, mask=inside[:, None] < D - start, other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        left += BLOCK_D
        right += BLOCK_D
    return product


@triton.jit
def _product_by_descriptors(
    hidden, weight, row_tile, column_tile, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T of one tile, (BLOCK_N, BLOCK_V) float32. Past an edge a descriptor reads 0."""
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        a = hidden.load([row_tile * BLOCK_N, start])
        b = weight.load([column_tile * BLOCK_V, start])
        product = tl.dot(a, b.T, product, input_precision="ieee")
    return product


@triton.jit
def _load_row(numbers, row_tile, N, BLOCK_N: tl.constexpr):
    """A number of each row of the tile, 0 past the last."""
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(numbers + rows, mask=rows < N, other=0)


@triton.jit
def _tile_pointers(matrix, stride, row_tile, column_tile, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    # the place of the tile may need more than 32 bits, the places inside it do not
    start = matrix + row_tile.to(tl.int64) * BLOCK_N * stride + column_tile * BLOCK_V
    return start + (tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :])


@triton.jit
def _load_tile(matrix, stride, row_tile, column_tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """One tile of a matrix of logits as float32, 0 past its edges."""
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers = _tile_pointers(matrix, stride, row_tile, column_tile, BLOCK_N, BLOCK_V)
    return tl.load(pointers, mask=(rows < N)[:, None] & (columns < V)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(matrix, stride, values, row_tile, column_tile, N, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write one tile, which has room up to its last column."""
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = _tile_pointers(matrix, stride, row_tile, column_tile, BLOCK_N, BLOCK_V)
    tl.store(pointers, values.to(matrix.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _logits(product, bias, column_tile, V, scale, softcap, BLOCK_V: tl.constexpr):
    """The logits of a tile of products; past V, anything."""
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = product * scale
    if bias is not None:
        logits += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        logits = softcap * _tanh(logits / softcap)
    return logits


@triton.jit
def _tanh(x):
    """tanh to about 2e-7 of its value: Triton has one for NVIDIA and one for AMD, and none for its interpreter."""
    square = x * x
    # the first terms of the series at 0, where the quotient would lose digits
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    quotient = 1 - 2 / (tl.exp(2 * x) + 1)
    return tl.where(square < 0.0625, series, quotient)


@triton.jit
def _finite_or_0(maximum):
    """A row of -inf alone has nothing to subtract; -inf - -inf would make it nan."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _write_partials(
    logits, targets, maxima, others, weighted, target_logits, kept, kept_stride, first_column,
    row_tile, column_tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < N
    target = _load_row(targets, row_tile, N, BLOCK_N) - first_column
    is_target = columns[None, :] == target[:, None]
    logits = tl.where((columns < V)[None, :], logits, float("-inf"))

    # the target lies in one tile of its row, so one program writes this; past V it is -inf, as if it lay nowhere
    has_target = (target >= column_tile * BLOCK_V) & (target < column_tile * BLOCK_V + BLOCK_V)
    target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
    tl.store(target_logits + rows, target_logit, mask=is_row & has_target)

    logits = tl.where(is_target, float("-inf"), logits)
    maximum = tl.maximum(tl.max(logits, 1), tl.where(has_target, target_logit, float("-inf")))
    distance = logits - _finite_or_0(maximum)[:, None]
    exps = tl.exp(distance)
    place = column_tile.to(tl.int64) * N + rows
    tl.store(maxima + place, maximum, mask=is_row)
    tl.store(others + place, tl.sum(exps, 1), mask=is_row)
    if weighted is not None:
        # exps is 0 below -104: a bound there keeps 0 * -inf from being nan
        tl.store(weighted + place, tl.sum(exps * tl.maximum(distance, -1000.0), 1), mask=is_row)
    if kept is not None:
        _store_tile(kept, kept_stride, distance, row_tile, column_tile, N, BLOCK_N, BLOCK_V)


@triton.jit
def _write_gradients(
    logits, distance, targets, log_sums, target_factors, grads, by_logits, by_logits_stride, first_column,
    row_tile, column_tile, N, softcap, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """distance: logits - center, whose exponential is the probability but for log_sum."""
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    target = _load_row(targets, row_tile, N, BLOCK_N) - first_column
    target_factor = _load_row(target_factors, row_tile, N, BLOCK_N)
    grad = _load_row(grads, row_tile, N, BLOCK_N)

    # log_sum apart: one number for both would round it as a large center is rounded
    toward = -tl.exp(distance - _load_row(log_sums, row_tile, N, BLOCK_N)[:, None])
    if softcap is not None:
        capped = logits / softcap
        toward *= 1 - capped * capped
    gradient = tl.where(columns[None, :] == target[:, None], target_factor[:, None], toward) * grad[:, None]
    _store_tile(by_logits, by_logits_stride, gradient, row_tile, column_tile, N, BLOCK_N, BLOCK_V)
