"""Every name of Gluon that is private, renamed between Triton versions, or missing: one place to check on an upgrade.

Gluon promises no stability. Read and compiled against Triton 3.6 to 3.9; the other files of this package use only names
that all of them have in public (envelope.py says which versions are served). Kernels import from here; nothing here
knows attention.
"""

from __future__ import annotations

import triton.language.core as tl_core
from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

_IS_NEW = hasattr(tma, "async_load")  # Triton 3.8 and later; from 3.9 on the old names only raise
if _IS_NEW:
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
#: wait until the sources of TMA stores have been read and may be written to again
tma_store_wait = tma.store_wait

#: all threads of the partition meet, and see what each wrote to shared memory
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

#: what the compiler is told at every launch. Triton 3.7 and later hand ptxas a level of register allocation with which
#: that of 3.9 (13.4) spills up to 1,100 bytes inside the loops of the backward; 4 is what ptxas does if it is not told.
OPTIONS = {"ptx_options": "--regAllocOptLevel=4"} if _IS_NEW else {}

# Ids of named barriers. The compiler numbers its own from 0, one for each partition; 8 to 15 are left to us, unseen by
# it. A kernel that needs a barrier takes FIRST_BARRIER + a number below NUM_BARRIERS.
FIRST_BARRIER = tl_core.constexpr(8)
NUM_BARRIERS = 8


def _asm(text: str, operands: list, semantic) -> None:
    """One instruction with side effects, ordered with all other memory operations; it gives nothing back.

    The compiler wants a result and an operand, whence a zero.
    """
    constraints = ",".join(["=r", *("r" for _ in operands), "~{memory}"])
    tl_core.inline_asm_elementwise(
        f"{{ {text}\n mov.b32 $0, 0; }}",
        constraints,
        operands,
        dtype=tl_core.int32,
        is_pure=False,
        pack=1,
        _semantic=semantic,
    )


@_core.builtin
def here(value, _semantic=None):
    """`value` (int32), which for LLVM begins to exist here: what is computed from it does not move up past this point.

    From 3.8 on a product is no inline assembly any more, and LLVM computes the wgmma descriptors of a whole block of
    code at its top, to be spilled or kept in vector registers.
    """
    if not _IS_NEW:
        return value
    value = _semantic.to_tensor(value)
    return tl_core.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,~{memory}", [value], dtype=tl_core.int32, is_pure=False, pack=1, _semantic=_semantic
    )


@_core.builtin
def barrier_sync(number, threads, _semantic=None):
    """Wait at named barrier `number` until `threads` threads (constexpr) have come, those that only arrive included."""
    threads = _core._unwrap_if_constexpr(threads)
    _asm(f"bar.sync $1, {threads};", [_semantic.to_tensor(number)], _semantic)


@_core.builtin
def barrier_arrive(number, threads, _semantic=None):
    """Come to named barrier `number` of `threads` threads without waiting; no barrier of the partition is added."""
    threads = _core._unwrap_if_constexpr(threads)
    _asm(f"bar.arrive $1, {threads};", [_semantic.to_tensor(number)], _semantic)


@_core.builtin
def tma_store_wait_complete(_semantic=None):
    """Wait until all TMA stores and reductions of this thread are written to global memory, not only read."""
    _asm("cp.async.bulk.wait_group 0;", [_semantic.to_tensor(0)], _semantic)


@_core.builtin
def tma_reduce_add(descriptor, coord, source, _semantic=None):
    """Add shared memory `source` to global memory, as `tma_store` stores it; committed as one group."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coord, source.handle)
