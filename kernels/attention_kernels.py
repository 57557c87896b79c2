"""The kernels of attention.py: forward; backward in two, for d_q and for d_k and d_v; backward in one.

With FP8, the output or the gradient is stored as `fp8_cast` would (see attention_fp8.py).
"""

from .fp8 import in_one
from .runtime import tl, triton

# The D columns of a head are two tiles, a (A wide) and b (B wide, absent if B = 0), as in tiles.py.


@triton.jit
def _load(base, rows, stride: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both tiles of these rows, in their own dtype; 0 at or past T and D."""
    cols = tl.arange(0, A)
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    a = tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    b = a
    if B > 0:
        cols = A + tl.arange(0, B)
        mask = (rows < T)[:, None] & (cols < D)[None, :]
        b = tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    return a, b


@triton.jit
def _store(base, rows, stride: tl.constexpr, a, b, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    cols = tl.arange(0, A)
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], a.to(base.dtype.element_ty), mask=mask)
    if B > 0:
        cols = A + tl.arange(0, B)
        mask = (rows < T)[:, None] & (cols < D)[None, :]
        tl.store(base + rows[:, None] * stride + cols[None, :], b.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _pairs(x, R: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """(R, C) -> (R, C / 2) int16: two neighbors of a row in FP8."""
    even, odd = tl.split(tl.reshape(x, [R, C // 2, 2]))
    return in_one(even, odd, dtype)


@triton.jit
def _store_fp8(
    base, columns, factor, first, stride: tl.constexpr, PAIRS, x, start: tl.constexpr, dtype: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write a tile, rows from `first` and columns from `start` of a head, times `factor` in FP8.

    To base row by row, and to columns (D, PAIRS) transposed, two values in each int16: T and D are even. The conversion
    saturates. Returns the largest magnitude. Rows at or past T must be zero.
    """
    largest = tl.max(tl.abs(x))
    rows, cols = first + tl.arange(0, ROWS), start // 2 + tl.arange(0, COLS // 2)
    mask = (rows < T)[:, None] & (cols < D // 2)[None, :]
    tl.store(base + rows[:, None] * (stride // 2) + cols[None, :], _pairs(x * factor, ROWS, COLS, dtype), mask=mask)
    rows, cols = first // 2 + tl.arange(0, ROWS // 2), start + tl.arange(0, COLS)
    mask = (cols < D)[:, None] & (rows < T // 2)[None, :]
    out = _pairs(tl.trans(x * factor), COLS, ROWS, dtype)
    tl.store(columns + cols[:, None] * PAIRS + rows[None, :], out, mask=mask)
    return largest


@triton.jit
def _store_gradient(
    d_qkv, columns, factor, partial, most, PAIRS, n, head, first, a, b, part: tl.constexpr,
    ROWS: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Write a head's gradient of q, k or v (part 0, 1, 2), both tiles, to rows of d_qkv (N, T, 3, H, D).

    With FP8 as `_store_fp8` does; their largest magnitude to most (chunks, 3, H) and their sum over the rows to partial
    (chunks, 3, H, D), where a chunk is a block of rows of a sample.
    """
    rows = first + tl.arange(0, ROWS)
    if FP8:
        d_qkv += ((n * T * 3 + part) * H + head) * (D // 2)
        columns += (part * H + head).to(tl.int64) * D * PAIRS + n * (T // 2)
        index = ((n * ((T + ROWS - 1) // ROWS) + first // ROWS) * 3 + part) * H + head
        scale, cols = tl.load(factor), tl.arange(0, A)
        if T % ROWS:
            a, b = tl.where((rows < T)[:, None], a, 0.0), tl.where((rows < T)[:, None], b, 0.0)
        tl.store(partial + index * D + cols, tl.sum(a, axis=0), mask=cols < D)
        seen = _store_fp8(d_qkv, columns, scale, first, 3 * H * D, PAIRS, a, 0, tl.float8e5, T, D, ROWS, A)
        if B > 0:
            more = _store_fp8(d_qkv, columns, scale, first, 3 * H * D, PAIRS, b, A, tl.float8e5, T, D, ROWS, B)
            seen, cols = tl.maximum(seen, more), A + tl.arange(0, B)
            tl.store(partial + index * D + cols, tl.sum(b, axis=0), mask=cols < D)
        tl.store(most + index, seen)
    else:
        _store(d_qkv + ((n * T * 3 + part) * H + head) * D, rows, 3 * H * D, a, b, T, D, A, B)


@triton.jit
def _zeros(ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    a = tl.zeros([ROWS, A], tl.float32)
    b = a
    if B > 0:
        b = tl.zeros([ROWS, B], tl.float32)
    return a, b


@triton.jit
def _products(x_a, x_b, y_a, y_b, B: tl.constexpr):
    """x y^T, over the columns of both tiles."""
    out = tl.dot(x_a, tl.trans(y_a), input_precision="ieee")
    if B > 0:
        out = tl.dot(x_b, tl.trans(y_b), out, input_precision="ieee")
    return out


@triton.jit
def _accumulate(sum_a, sum_b, p, x_a, x_b, B: tl.constexpr):
    """sum + p x, both tiles."""
    sum_a = tl.dot(p, x_a, sum_a, input_precision="ieee")
    if B > 0:
        sum_b = tl.dot(p, x_b, sum_b, input_precision="ieee")
    return sum_a, sum_b


@triton.jit
def _block_of(H: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, head and first row."""
    blocks: tl.constexpr = (T + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    return n, tl.program_id(0) // blocks % H, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _attention_forward(
    q, k, v, out, lse, low, columns, factor, seen, PAIRS,
    q_n, k_n, v_n, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, head, first = _block_of(H, T, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    q_a, q_b = _load(q, rows, q_t, T, D, A, B)
    sum_a, sum_b = _zeros(BLOCK_M, A, B)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _load(k, keys, k_t, T, D, A, B)
        scores = _products(q_a, q_b, k_a, k_b, B) * (SCALE * 1.4426950408889634)  # powers of 2
        if T % BLOCK_N:
            scores = tl.where((keys < T)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(scores - higher[:, None])
        most = higher
        total = total * fade + tl.sum(p, axis=1)
        v_a, v_b = _load(v, keys, v_t, T, D, A, B)
        p = p.to(v.dtype.element_ty)
        sum_a, sum_b = _accumulate(sum_a * fade[:, None], sum_b * fade[:, None], p, v_a, v_b, B)
    sum_a, sum_b = sum_a / total[:, None], sum_b / total[:, None]
    _store(out + (n * T * H + head) * D, rows, H * D, sum_a, sum_b, T, D, A, B)
    if FP8:
        low += (n * T * H + head) * (D // 2)
        columns += head.to(tl.int64) * D * PAIRS + n * (T // 2)
        scale = tl.load(factor)
        if T % BLOCK_M:
            sum_a = tl.where((rows < T)[:, None], sum_a, 0.0)
            sum_b = tl.where((rows < T)[:, None], sum_b, 0.0)
        largest = _store_fp8(low, columns, scale, first, H * D, PAIRS, sum_a, 0, tl.float8e4nv, T, D, BLOCK_M, A)
        if B > 0:
            more = _store_fp8(low, columns, scale, first, H * D, PAIRS, sum_b, A, tl.float8e4nv, T, D, BLOCK_M, B)
            largest = tl.maximum(largest, more)
        tl.store(seen + tl.program_id(0), largest)
    tl.store(lse + (n * H + head) * T + rows, most + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_backward_q(
    d_out, q, k, v, out, lse, delta, d_qkv, columns, factor, partial, most, PAIRS,
    do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, head, first = _block_of(H, T, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    out += (n * T * H + head) * D
    stats = (n * H + head) * T + rows
    q_a, q_b = _load(q, rows, q_t, T, D, A, B)
    do_a, do_b = _load(d_out, rows, do_t, T, D, A, B)
    out_a, out_b = _load(out, rows, H * D, T, D, A, B)
    total = tl.sum(do_a.to(tl.float32) * out_a.to(tl.float32), axis=1)
    if B > 0:
        total += tl.sum(do_b.to(tl.float32) * out_b.to(tl.float32), axis=1)
    dq_a, dq_b = _zeros(BLOCK_M, A, B)
    tl.store(delta + stats, total, mask=rows < T)
    level = tl.load(lse + stats, mask=rows < T, other=float("inf"))
    for start in tl.range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _load(k, keys, k_t, T, D, A, B)
        v_a, v_b = _load(v, keys, v_t, T, D, A, B)
        scores = _products(q_a, q_b, k_a, k_b, B)
        dp = _products(do_a, do_b, v_a, v_b, B)
        p = tl.exp2(scores * (SCALE * 1.4426950408889634) - level[:, None])
        if T % BLOCK_N:
            p = tl.where((keys < T)[None, :], p, 0.0)  # 2^(0 - level) may overflow there
        ds = (p * (dp - total[:, None])).to(k.dtype.element_ty)
        dq_a, dq_b = _accumulate(dq_a, dq_b, ds, k_a, k_b, B)
    _store_gradient(d_qkv, columns, factor, partial, most, PAIRS, n, head, first, dq_a * SCALE, dq_b * SCALE, 0,
                    BLOCK_M, H, T, D, A, B, FP8)  # fmt: skip


@triton.jit
def _attention_backward_kv(
    d_out, q, k, v, lse, delta, d_qkv, columns, factor, partial, most, PAIRS,
    do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, head, first = _block_of(H, T, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)  # keys; scores are (keys, queries) here
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    stats = (n * H + head) * T
    k_a, k_b = _load(k, rows, k_t, T, D, A, B)
    v_a, v_b = _load(v, rows, v_t, T, D, A, B)
    dk_a, dk_b = _zeros(BLOCK_M, A, B)
    dv_a, dv_b = _zeros(BLOCK_M, A, B)
    for start in tl.range(0, T, BLOCK_N):
        queries = start + tl.arange(0, BLOCK_N)
        q_a, q_b = _load(q, queries, q_t, T, D, A, B)
        do_a, do_b = _load(d_out, queries, do_t, T, D, A, B)
        scores = _products(k_a, k_b, q_a, q_b, B)
        dp = _products(v_a, v_b, do_a, do_b, B)
        # a query at or past T has probability 2^-inf = 0
        level = tl.load(lse + stats + queries, mask=queries < T, other=float("inf"))
        total = tl.load(delta + stats + queries, mask=queries < T, other=0.0)
        p = tl.exp2(scores * (SCALE * 1.4426950408889634) - level[None, :])
        ds = (p * (dp - total[None, :])).to(q.dtype.element_ty)
        dv_a, dv_b = _accumulate(dv_a, dv_b, p.to(d_out.dtype.element_ty), do_a, do_b, B)
        dk_a, dk_b = _accumulate(dk_a, dk_b, ds, q_a, q_b, B)
    _store_gradient(d_qkv, columns, factor, partial, most, PAIRS, n, head, first, dk_a * SCALE, dk_b * SCALE, 1,
                    BLOCK_M, H, T, D, A, B, FP8)  # fmt: skip
    _store_gradient(d_qkv, columns, factor, partial, most, PAIRS, n, head, first, dv_a, dv_b, 2,
                    BLOCK_M, H, T, D, A, B, FP8)  # fmt: skip


@triton.jit
def _attention_backward_whole(
    d_out, q, k, v, out, lse, d_qkv, do_n, q_n, k_n, v_n,
    do_h: tl.constexpr, q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr,
    do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per head: BLOCK_M >= T, so each operand is read once.

    d_k and d_v are computed transposed, d_k^T = q^T dS: Hopper takes the second operand from shared memory as it is.
    Their products have the width of a tile as their height, and that must be 64 there: q and d_out's second tile is
    also held A wide, as c.
    """
    n, head, first = _block_of(H, T, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q += n * q_n + head * q_h
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    d_out += n * do_n + head * do_h
    out += (n * T * H + head) * D
    d_qkv += (n * T * 3 * H + head) * D
    # out first: its registers are free again before q is loaded
    out_a, out_b = _load(out, rows, H * D, T, D, A, B)
    do_a, do_b = _load(d_out, rows, do_t, T, D, A, B)
    total = tl.sum(do_a.to(tl.float32) * out_a.to(tl.float32), axis=1)
    if B > 0:
        total += tl.sum(do_b.to(tl.float32) * out_b.to(tl.float32), axis=1)
    q_a, q_b = _load(q, rows, q_t, T, D, A, B)
    level = tl.load(lse + (n * H + head) * T + rows, mask=rows < T, other=float("inf"))
    dq_a, dq_b = _zeros(BLOCK_M, A, B)
    if B > 0:
        q_c, _ = _load(q + A, rows, q_t, T, D - A, A, 0)
        do_c, _ = _load(d_out + A, rows, do_t, T, D - A, A, 0)
        q_c, do_c = tl.trans(q_c), tl.trans(do_c)
    C: tl.constexpr = A if B > 0 else 0
    for start in tl.range(0, T, BLOCK_N, disable_licm=True):  # hoisted loads and addresses would not fit
        keys = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _load(k, keys, k_t, T, D, A, B)
        v_a, v_b = _load(v, keys, v_t, T, D, A, B)
        scores = _products(q_a, q_b, k_a, k_b, B)
        p = tl.exp2(scores * (SCALE * 1.4426950408889634) - level[:, None])
        if T % BLOCK_N:
            p = tl.where((keys < T)[None, :], p, 0.0)  # 2^(0 - level) may overflow there
        low = p.to(k.dtype.element_ty)
        dv_a = tl.trans(tl.dot(tl.trans(do_a), low, input_precision="ieee"))
        dv_c = dv_a
        if B > 0:
            dv_c = tl.trans(tl.dot(do_c, low, input_precision="ieee"))
        _store(d_qkv + 2 * H * D, keys, 3 * H * D, dv_a, dv_c, T, D, A, C)
        dp = _products(do_a, do_b, v_a, v_b, B)
        ds = (p * (dp - total[:, None])).to(k.dtype.element_ty)
        dq_a, dq_b = _accumulate(dq_a, dq_b, ds, k_a, k_b, B)
        dk_a = tl.trans(tl.dot(tl.trans(q_a), ds, input_precision="ieee"))
        dk_c = dk_a
        if B > 0:
            dk_c = tl.trans(tl.dot(q_c, ds, input_precision="ieee"))
        _store(d_qkv + H * D, keys, 3 * H * D, dk_a * SCALE, dk_c * SCALE, T, D, A, C)
    _store(d_qkv, rows, 3 * H * D, dq_a * SCALE, dq_b * SCALE, T, D, A, B)
