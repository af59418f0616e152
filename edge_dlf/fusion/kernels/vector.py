"""Building blocks of the kernels: vectorised exponentials, integer maxima, rows by address, atomic counters."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from .cache import kept

KEY_INF, KEY_NEG_INF = 0x7F800000, -0x7F800001
"""`order_key` of +inf and −inf. The keys of NaNs lie outside this range."""
OK, HAS_NEG_INF, HAS_NAN, HAS_INF, NONE_FINITE = range(5)
"""Conditions of a row of logits. The last three are errors."""
F32, F64 = np.float32, np.float64

_POLYNOMIAL = (
    0.0013813144760206342,
    0.008369418792426586,
    0.04166845604777336,
    0.16666515171527863,
    0.4999999403953552,
)
"""Coefficients of (exp(r) − 1 − r) / r² for |r| ≤ ln(2) / 2, highest power first. They minimise the largest relative
error of exp, which is 5e-9."""
_POLYNOMIAL_64 = tuple(1.0 / math.factorial(k) for k in range(13, 1, -1))
"""Taylor coefficients of the same function, for float64."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


_PART: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Options of a function that is called by kernels alone."""


def kernel(function: _Function) -> _Function:
    """Compile a function that Python calls, on first use; kept on disk with all that it calls."""
    return cast(_Function, kept(njit(nogil=True, error_model="numpy")(function)))


def jit(function: _Function) -> _Function:
    """Compile a function that kernels call, as a part of each of them. Python cannot call it."""
    return cast(_Function, njit(**_PART)(function))


def jit_sum(function: _Function) -> _Function:
    """Compile as `jit` does, and let sums be added in any order. No flag lets NaN or inf vanish."""
    return cast(_Function, njit(fastmath={"reassoc", "contract", "nsz"}, **_PART)(function))


def _prefer_wide_vectors(function: Any) -> None:
    """Let LLVM use 512-bit vectors where the CPU has them. By default it stops at 256 bits, a third slower here."""
    if isinstance(function.attributes, set):
        set.add(function.attributes, '"prefer-vector-width"="512"')  # its own `add` knows no such string attributes


def _exponential(bits: int, minus_one: bool) -> Any:
    """LLVM IR of exp(x), or of exp(x) − 1, that the loop vectoriser accepts. x is clamped from below."""
    mantissa, lowest, polynomial = (23, -87.0, _POLYNOMIAL) if bits == 32 else (52, -708.0, _POLYNOMIAL_64)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _prefer_wide_vectors(builder.function)
        real, integer = ir.FloatType() if bits == 32 else ir.DoubleType(), ir.IntType(bits)
        muladd = builder.module.declare_intrinsic("llvm.fmuladd", [real], ir.FunctionType(real, [real] * 3))

        def constant(value: float) -> Any:
            return ir.Constant(real, float(np.float32(value)) if bits == 32 else value)

        x = builder.select(builder.fcmp_ordered(">", args[0], constant(lowest)), args[0], constant(lowest))
        # Adding 1.5·2²³ (2⁵²) rounds x·log2(e) to an integer n, which then stands in the low bits of the sum.
        shifted = builder.call(muladd, [x, constant(1.4426950408889634), constant(1.5 * 2.0**mantissa)])
        n = builder.fsub(shifted, constant(1.5 * 2.0**mantissa))
        r = builder.call(muladd, [n, constant(-0.6931471805599453), x])
        exponent = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, mantissa))
        one = ir.Constant(integer, (2 ** (bits - mantissa - 2) - 1) << mantissa)
        scale = builder.bitcast(builder.add(exponent, one), real)
        p = constant(polynomial[0])
        for coefficient in polynomial[1:]:
            p = builder.call(muladd, [p, r, constant(coefficient)])
        p = builder.call(muladd, [builder.fmul(p, r), r, r])
        offset = builder.fsub(scale, constant(1.0)) if minus_one else scale
        return builder.call(muladd, [scale, p, offset])

    kind = types.float32 if bits == 32 else types.float64
    return lambda _typing, _x: (kind(kind), generate)


def _wide_typing(_typing: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        _prefer_wide_vectors(builder.function)
        return context.get_dummy_value()

    return types.none(), generate


def _fetch_add_typing(_typing: Any, array: Any, index: Any, step: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.gep(data, [args[1]])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


def _load_typing(_typing: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(array, types.int64), generate


def _pointer_typing(_typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer
    return pointer(types.float32)(types.int64), generate


def _plain_exp(x: Any) -> Any:
    return F32(np.exp(F64(max(x, -87.0))))


def _plain_expm1(x: Any) -> Any:
    return F32(np.expm1(F64(max(x, -87.0))))


def _plain_exp64(x: Any) -> Any:
    return np.exp(max(x, -708.0))


def _plain_wide() -> None:
    pass


def _plain_fetch_add(array: Any, index: int, step: int) -> int:
    array[index] += step
    return int(array[index] - step)


def _plain_load(array: Any, index: int) -> int:
    return int(array[index])


def _plain_pointer(address: Any) -> Any:
    return ctypes.cast(int(address), ctypes.POINTER(ctypes.c_float))


_compiled = not vars(config)["DISABLE_JIT"]
exp: Any = intrinsic(_exponential(32, minus_one=False)) if _compiled else _plain_exp
expm1: Any = intrinsic(_exponential(32, minus_one=True)) if _compiled else _plain_expm1
exp64: Any = intrinsic(_exponential(64, minus_one=False)) if _compiled else _plain_exp64
use_wide_vectors: Any = intrinsic(_wide_typing) if _compiled else _plain_wide
fetch_add: Any = intrinsic(_fetch_add_typing) if _compiled else _plain_fetch_add
load: Any = intrinsic(_load_typing) if _compiled else _plain_load
_pointer: Any = intrinsic(_pointer_typing) if _compiled else _plain_pointer


@jit
def row_at(address: Any, size: int) -> Any:
    """The float32 row (size,) at a memory address. A list of arrays would be compiled anew for each length."""
    return carray(_pointer(address), size)


@jit
def first_largest(values: Any) -> Any:
    """Index of the first largest element of an array (N,) without NaN, N > 0.

    NumPy's own reductions and assignments from array to array take Numba 0.2 to 2 s each to compile.
    """
    best = 0
    for i in range(1, values.size):
        if values[i] > values[best]:
            best = i
    return best


@jit
def order_key(bits: Any) -> Any:
    """An int32 that orders like the float32 of these bits. The function is its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@jit
def extremes(bits: Any, out: Any) -> None:
    """Largest and smallest `order_key` of a row given as int32 bits, into out (2,). Integer maxima vectorise."""
    use_wide_vectors()
    high = np.int32(-0x80000000)
    low = np.int32(0x7FFFFFFF)
    for i in range(bits.size):
        key = order_key(bits[i])
        high = max(high, key)
        low = min(low, key)
    out[0] = high
    out[1] = low


@jit
def row_condition(high: Any, low: Any) -> Any:
    """Condition of a row with this largest and smallest key."""
    if high > KEY_INF or low < KEY_NEG_INF:
        return HAS_NAN
    if high == KEY_INF:
        return HAS_INF
    if high == KEY_NEG_INF:
        return NONE_FINITE
    return HAS_NEG_INF if low == KEY_NEG_INF else OK
