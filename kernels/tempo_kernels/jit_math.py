"""Small functions that several kernels share, compiled by Triton."""

# Triton reads annotations such as tl.constexpr from text, so this file also imports where there is no Triton.
from __future__ import annotations

from tempo_kernels.dispatch import IS_INTERPRETED, jit, tl, triton

# Below every logit, yet finite: exp of it is 0, and 0 times it is 0, where 0 * -inf would be NaN.
MASKED_LOGIT = -1e30
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

if triton is not None:
    MASKED: tl.constexpr = tl.constexpr(MASKED_LOGIT)
    LOG2E: tl.constexpr = tl.constexpr(LOG2_E)
    INTERPRETED: tl.constexpr = tl.constexpr(IS_INTERPRETED)


@jit
def operand(x):
    """x as `tl.dot` can take it: the interpreter multiplies the bit patterns of bfloat16, so it gets float32."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@jit
def rounded(x, pointer):
    """float32 x in the dtype that `pointer` points to, rounded to nearest even: the interpreter truncates to bfloat16."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        is_nan = x != x
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(is_nan, x, bits.to(tl.float32, bitcast=True))
    return x.to(pointer.dtype.element_ty)


@jit
def exp(x):
    return tl.exp2(x * LOG2E)


@jit
def tanh(x):
    """From the logistic function: libdevice's tanh does not exist in the interpreter. Absolute error below 2e-7."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
