"""Device functions shared by the kernels. Each carries its mathematical name; base 2 inside, natural logarithms
outside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter's tl.dot multiplies 16-bit operands as raw integers, so operands are widened first there.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# hash32 from the words $1 of the row and $2 of the column, but for its last step: the beginning of a block of
# instructions, with a register u for fp32, that is one to the compiler, which else holds the words of a whole tile in
# registers.
_MIXED = """{
    .reg .u32 word, high;
    .reg .f32 u;
    xor.b32 word, $1, $2;
    mul.lo.u32 word, word, 0x7FEB352D;
    shr.u32 high, word, 15;
    xor.b32 word, word, high;
    mul.lo.u32 word, word, 0x846CA68B;
"""
# The whole of it.
DRAWN = tl.constexpr(
    _MIXED
    + """
    shr.u32 high, word, 16;
    xor.b32 word, word, high;
"""
)
# $3 - $4 u for a u that the draw u of those words exceeds by at most 2^-15: its upper 16 bits, which the last step
# leaves as they are, and what stands below them less 2^-16.
BEYOND = tl.constexpr(
    _MIXED
    + """
    shf.r.wrap.b32 word, word, 0x7F, 9;
    mov.b32 u, word;
    sub.rn.f32 u, 0f3F800080, u;
    fma.rn.f32 $0, u, $4, $3;
}"""
)


@triton.jit
def load_tile(
    x,  # (rows, columns): a tensor descriptor if TMA, else a pointer
    stride,  # strides of x in elements
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """x[row : row + ROWS, column : column + COLUMNS], 0 outside."""
    if TMA:
        return x.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        place = i[:, None].to(tl.int64) * stride[0] + j[None, :].to(tl.int64) * stride[1]
        return tl.load(x + place, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with fp32 accumulation."""
    if INTERPRETED:
        return acc + tl.dot(widened(a), widened(b))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def widened(x):
    """x in fp32. The interpreter makes other numbers of what is subnormal in bf16, so there the bits are moved."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """x (fp32) rounded to nearest even. The interpreter truncates to bf16, so there the bits are rounded beforehand."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def reciprocal(x):
    """1 / x to 1 ulp, for normal x with a normal reciprocal: one instruction."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tanh(y):
    """tanh to about 3 ulp: an odd polynomial (relative error 1.5e-8, fitted) below 1/2, 1 - 2 q / (1 + q) above, q =
    exp -2|y|.
    """
    a = tl.abs(y)
    y2 = y * y
    series = -0.053045479973 + y2 * 0.017241460416
    series = -0.33333143888 + y2 * (0.133258787567 + y2 * series)
    q = tl.exp2(a * (-2 * LOG2E))
    large = 1.0 - 2.0 * q * reciprocal(1.0 + q)
    return tl.where(a < 0.5, y + y * (y2 * series), tl.where(y < 0, -large, large))


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp for x >= 0 (W. Kahan: divide by the argument that the logarithm really saw)."""
    u = 1.0 + x
    step = u - 1.0
    return tl.where(step == 0.0, x, tl.log(u) * (x / tl.where(step == 0.0, 1.0, step)))


@triton.jit
def exp(x):
    """e^x to a few ulp: with what rounding the exponent of two lost."""
    power = x * LOG2E
    lost = tl.where(tl.abs(power) < 256.0, tl.fma(x, LOG2E, -power), 0.0)
    return tl.exp2(power) * (1.0 + lost * LN2)


@triton.jit
def expm1(x):
    """exp(x) - 1 to a few ulp for x <= 0: a Taylor polynomial down to -1/2 (truncation < 2^-26 relative), else the
    difference.
    """
    series = 1.0 + x * (1.0 / 8) * (1.0 + x * (1.0 / 9))
    series = 1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7) * series)
    series = 1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * series)))
    return tl.where(x > -0.5, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def two_sum(a, b):
    """(s, r) with s = fl(a + b) and s + r = a + b exactly (Knuth)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


@triton.jit
def kahan_add(total, compensation, value, DTYPE: tl.constexpr):
    """One compensated addition with a pair held in DTYPE; value fp32. Returns the new pair, in DTYPE."""
    old = total.to(tl.float32)
    value = value - compensation.to(tl.float32)
    new = round_to(old + value, DTYPE)
    return new, round_to((new.to(tl.float32) - old) - value, DTYPE)


@triton.jit
def cap(y, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(y / softcap) and the slope 1 - tanh^2; y and 1 without a softcap."""
    if SOFTCAP:
        t = tanh(y * (1.0 / softcap))
        return softcap * t, 1.0 - t * t
    else:
        return y, 1.0


@triton.jit
def online_softmax_update(m, s, a, z, scale, ENTROPY: tl.constexpr):
    """Takes a tile z (rows, columns) into the row maximum m of z, s = sum 2^(y - r) and a = sum 2^(y - r) (r - y).

    Here y = scale z with scale > 0, and r = fl(scale m) is the reference of the base-2 powers.
    A row of -inf alone keeps s = 0. NaN stays NaN. Source: Milakov and Gimelshein, arXiv 1805.02867.
    """
    top = tl.maximum(m, tl.max(z, 1))
    reference = reference_of(top, scale)
    decay = decay_of(m, top, scale)
    below = z * scale - reference[:, None]  # one fused multiply-add
    p = tl.exp2(below)
    if ENTROPY:
        step = reference - reference_of(m, scale)
        a = decay * (a + s * step) - tl.sum(p * tl.maximum(below, -2048.0), 1)
    return top, decay * s + tl.sum(p, 1), a


@triton.jit
def either(a, b):
    """The bits of both."""
    return a | b


@triton.jit
def decay_of(m, top, scale):
    """2^(scale (m - top)) for m <= top; exactly 1 where they are equal, or a long walk would drift."""
    return tl.where(m == top, 1.0, tl.exp2((m - top) * scale))


@triton.jit
def reference_of(m, scale):
    """fl(scale m); 0 where m is -inf, so that -inf minus the reference is no NaN."""
    return tl.where(m == float("-inf"), 0.0, m * scale)


@triton.jit
def hash32(seed_low, seed_high, row, column):
    """A 32-bit word for each (seed, row, column); all arguments uint32, rows and columns broadcast.

    Mixer: C. Wellons, hash-prospector, lowbias32 (public domain). Its first step is linear: rows and columns each take
    it before they meet.
    """
    return stirred(row_word(seed_low, seed_high, row) ^ column_word(column))


@triton.jit
def row_word(seed_low, seed_high, row):
    """What hash32 makes of the seed and the row."""
    return folded(mix32(mix32(row ^ mix32(seed_low)) ^ seed_high))


@triton.jit
def column_word(column):
    """What hash32 makes of the column."""
    return folded(column * 0x9E3779B9)


@triton.jit
def mix32(x):
    """A bijective mixer of uint32 words."""
    return stirred(folded(x))


@triton.jit
def folded(x):
    """The mixer's first step."""
    return x ^ (x >> 16)


@triton.jit
def stirred(x):
    """The mixer's other steps."""
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def wide(x):
    """An integer argument as int64, also where it is 1 and hence a compile-time constant."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def grouped(pid, inner, outer, GROUP: tl.constexpr):
    """(i, o) for a walk in which GROUP neighbours i share each o, so that both operands' tiles stay in the L2 cache.

    pid enumerates inner x outer; every pair appears once.
    """
    width = GROUP * outer
    first = (pid // width) * GROUP
    size = tl.minimum(inner - first, GROUP)
    place = pid % width
    return first + place % size, place // size


@triton.jit
def add_parts(
    acc, left, right, OF_LEFT: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + left right, where the one in fp32 (left if OF_LEFT) is a sum of PARTS numbers of the other's dtype.

    Three parts are all of fp32; fp16, whose range does not hold the parts of a small number, is widened instead.
    """
    if (tl.float16 == DTYPE) & (PARTS == 3):
        return multiply_add(left.to(tl.float32), right.to(tl.float32), acc, "ieee")
    rest = left if OF_LEFT else right
    for i in tl.static_range(PARTS):
        part = round_to(rest, DTYPE)
        if OF_LEFT:
            acc = multiply_add(part, right, acc, PRECISION)
        else:
            acc = multiply_add(left, part, acc, PRECISION)
        if i + 1 < PARTS:
            rest -= part.to(tl.float32)
    return acc
