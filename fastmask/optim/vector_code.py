"""Instructions that `numba` has no words for: pointers from addresses, an atomic counter, prefetches, whole vectors.

Each function returns a numba intrinsic, which writes LLVM code where it is called. Imported only where numba is there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["LANES", "fetch_and_add", "lanes", "pointer_to", "prefetch"]

LANES = 16  # floats of a cache line
INT32, INT64 = ir.IntType(32), ir.IntType(64)


def pointer_to(scalar: Any) -> Any:
    """A function pointer(address): what can be indexed, from an address, int64."""

    @intrinsic
    def pointer(_context, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(scalar)(types.int64), generate

    return pointer


def fetch_and_add() -> Any:
    """A function of a pointer: add 1 to the int64 behind a pointer and return what it was, atomically."""

    @intrinsic
    def fetch_and_add(_context, counter):  # type: ignore[no-untyped-def]
        def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
            return builder.atomic_rmw("add", arguments[0], ir.Constant(INT64, 1), "monotonic")

        return types.int64(types.CPointer(types.int64)), generate

    return fetch_and_add


def prefetch(scalar: Any) -> Any:
    """A function of a pointer p and `at`: have the cache line of p[at] on its way, if there is one at that address."""

    @intrinsic
    def prefetch(_context, p, at):  # type: ignore[no-untyped-def]
        def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
            byte = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
            call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
            builder.call(call, [place, INT32(0), INT32(3), INT32(1)])  # for reading, into all caches, data
            return context.get_dummy_value()

        return types.void(types.CPointer(scalar), types.int64), generate

    return prefetch


def lanes(scalar: Any) -> Any:
    """A function of (p, g, m, v, at, bits, *f): AdamW on the 16 weights from `at` on, where the bit is set.

    With f = (sign, lr * decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), (1 - beta2^t)^-1/2, eps):
    g = sign g; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; p -= f1 p; p -= f5 m / (f6 sqrt(v) + eps).
    Written as vectors, because a compiler does not make any of a loop that may skip, over pointers that may overlap.
    """

    @intrinsic
    def lanes(_context, p, g, m, v, at, bits, f0, f1, f2, f3, f4, f5, f6, f7):  # type: ignore[no-untyped-def]
        def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
            pointers, at, bits, factors = arguments[:4], arguments[4], arguments[5], arguments[6:]
            vector = ir.VectorType(context.get_value_type(scalar), LANES)
            align = scalar.bitwidth // 8
            nothing = ir.Constant(vector, ir.Undefined)

            def everywhere(value: Any) -> Any:
                first = builder.insert_element(nothing, value, INT32(0))
                return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))

            places = [builder.bitcast(builder.gep(pointer, [at]), vector.as_pointer()) for pointer in pointers]
            p, g, m, v = (builder.load(place, align=align) for place in places)
            sign, decay, new1, beta2, new2, size, root, eps = map(everywhere, factors)
            g = builder.fmul(sign, g)
            new_m = builder.fadd(m, builder.fmul(new1, builder.fsub(g, m)))
            new_v = builder.fadd(builder.fmul(beta2, v), builder.fmul(new2, builder.fmul(g, g)))
            kind = ir.FunctionType(vector, [vector])
            sqrt = cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{LANES}f{scalar.bitwidth}")
            below = builder.fadd(builder.fmul(root, builder.call(sqrt, [new_v])), eps)
            decayed = builder.fsub(p, builder.fmul(decay, p))
            new_p = builder.fsub(decayed, builder.fdiv(builder.fmul(size, new_m), below))
            keep = builder.bitcast(builder.trunc(bits, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
            for place, new, old in ((places[0], new_p, p), (places[2], new_m, m), (places[3], new_v, v)):
                builder.store(builder.select(keep, new, old), place, align=align)
            return context.get_dummy_value()

        arguments = (*[types.CPointer(scalar)] * 4, types.int64, types.int32, *[scalar] * 8)
        return types.void(*arguments), generate

    return lanes
