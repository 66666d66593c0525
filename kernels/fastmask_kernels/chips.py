"""The chips that the kernels are compiled for: what each allows, how fast it is, and which of them a tensor lies on.

One `Chip` for each compile target. Limits are the architecture's; rates are those of one product that has it, and are
the vendor's unless they are marked as measured. Vendors state peaks that no kernel reaches, so shares predicted from
them are optimistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["CHIPS", "Chip", "chip_of", "has_tf32", "multiprocessors"]

KiB, TB, TERA = 1024, 1e12, 1e12


@dataclass(frozen=True)
class Chip:
    """A compile target and one product that stands for it.

    Attributes:
        target: as the tables of block sizes name it.
        product: whose rates these are.
        multiprocessors: how many it has (AMD: compute units).
        backend, arch, warp_size: what Triton's `GPUTarget` takes.
        shared_memory: bytes of a multiprocessor that programs share among them.
        program_memory: bytes that one program may ask for, on each chip that takes the target's block sizes.
        tensor_memory: columns of tensor memory that one program may ask for; 0 where there is none.
        tensor_16bit, tensor_32bit: how the tensor-core instructions begin that a dot of 16-bit or of tf32 operands
            should compile to.
        flops_16bit, flops_tf32, flops_fp32: FLOP/s, dense: bf16 or fp16 and tf32 tensor cores, fp32 outside of them.
        memory, l2: bytes/s read from memory and from the cache that all multiprocessors share.
    """

    target: str
    product: str
    multiprocessors: int
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    program_memory: int
    tensor_memory: int
    tensor_16bit: tuple[str, ...]
    tensor_32bit: tuple[str, ...]
    flops_16bit: float
    flops_tf32: float
    flops_fp32: float
    memory: float
    l2: float

    def flops(self, kind: str) -> float:
        """FLOP/s with operands of a kind, as the tables of block sizes name them."""
        return {"tf32": self.flops_tf32, "ieee": self.flops_fp32}.get(kind, self.flops_16bit)


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": at most 163 KB of one
# block on 8.0, 99 KB on 8.6, 8.9 and 12.x, which take the same block sizes, 227 KB on 9.0 and 10.0 (1 KB of the
# multiprocessor's is the system's).
# Tensor memory: PTX ISA, tcgen05: 512 columns of 128 lanes.
CHIPS: dict[str, Chip] = {
    chip.target: chip
    for chip in (
        Chip(
            target="sm_80",
            product="A100 SXM 80 GB",
            multiprocessors=108,
            backend="cuda",
            arch=80,
            warp_size=32,
            shared_memory=163 * KiB,
            program_memory=99 * KiB,
            tensor_memory=0,
            tensor_16bit=("HMMA",),
            tensor_32bit=("HMMA",),
            # NVIDIA A100 datasheet, without sparsity.
            flops_16bit=312 * TERA,
            flops_tf32=156 * TERA,
            flops_fp32=19.5 * TERA,
            memory=2.039 * TB,
            # A100 whitepaper: 5120 bytes read per clock, at the boost clock of 1.41 GHz. Theoretical.
            l2=5120 * 1.41e9,
        ),
        Chip(
            target="sm_90",
            product="H200 SXM",
            multiprocessors=132,
            backend="cuda",
            arch=90,
            warp_size=32,
            shared_memory=227 * KiB,
            program_memory=227 * KiB,
            tensor_memory=0,
            tensor_16bit=("HGMMA",),
            tensor_32bit=("HGMMA", "HMMA"),
            # Measured on such a chip, though not by this repository: a large bf16 matmul (datasheet: 989.5 TFLOP/s)
            # and a copy (datasheet: 4.8 TB/s).
            flops_16bit=790 * TERA,
            memory=4.3 * TB,
            # NVIDIA H200 datasheet, halved where it counts sparsity.
            flops_tf32=494.7 * TERA,
            flops_fp32=67 * TERA,
            # NVIDIA states none. The A100's 5120 bytes per clock at 1.755 GHz, as published comparisons assume
            # (e.g. table 3 of PMC10448217). Theoretical; what is measured is lower.
            l2=5120 * 1.755e9,
        ),
        Chip(
            target="sm_100",
            product="B200",
            multiprocessors=148,
            backend="cuda",
            arch=100,
            warp_size=32,
            shared_memory=227 * KiB,
            program_memory=227 * KiB,
            tensor_memory=512,
            tensor_16bit=("UTCHMMA",),
            tensor_32bit=("UTCHMMA", "HMMA"),
            # NVIDIA HGX B200 datasheet: an eighth of the board, halved where it counts sparsity.
            flops_16bit=2250 * TERA,
            flops_tf32=1125 * TERA,
            flops_fp32=75 * TERA,
            memory=8.0 * TB,
            # NVIDIA states none. A guess: as many bytes per clock and multiprocessor as assumed for sm_90 (5120 / 132),
            # on 148 of them at 1.85 GHz.
            l2=5120 / 132 * 148 * 1.85e9,
        ),
        Chip(
            target="gfx942",
            product="MI300X",
            multiprocessors=304,
            backend="hip",
            arch="gfx942",
            warp_size=64,
            shared_memory=64 * KiB,
            program_memory=64 * KiB,
            tensor_memory=0,
            tensor_16bit=("v_mfma",),
            tensor_32bit=("v_mfma",),
            # AMD Instinct MI300X datasheet, without sparsity.
            flops_16bit=1307.4 * TERA,
            flops_tf32=653.7 * TERA,
            flops_fp32=163.4 * TERA,
            memory=5.3 * TB,
            # AMD CDNA 3 whitepaper: 2 KiB read per clock in each of 8 dies, at 2.1 GHz. Theoretical, and each die
            # caches for itself: what another die has loaded comes from the slower cache behind.
            l2=8 * 2048 * 2.1e9,
        ),
    )
}


# ---- which of them a tensor lies on

stand_in = "sm_90"  # what a device counts as that is no GPU (the interpreter's, the recorder's)


def chip_of(device: torch.device) -> str:
    """One of "sm_80", "sm_90", "sm_100" and "gfx942"; what is no GPU counts as `stand_in`.

    A newer or older chip takes the entry of the nearest one that is not newer, so that its launches fit.
    """
    return _chip(device) if device.type == "cuda" else stand_in


@cache
def _chip(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # 12.x (consumer Blackwell) has the shared memory and the instructions of 8.x.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def has_tf32(device: torch.device) -> bool:
    """Whether Triton takes TF32 products there: of AMD's chips only for gfx942, for others it is a compile error."""
    return torch.version.hip is None or device.type != "cuda" or _architecture(device) == "gfx942"


@cache
def _architecture(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]  # of gfx942:sramecc+:xnack-


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; of what is no GPU those of the product that stands for `chip_of`."""
    return _multiprocessors(device) if device.type == "cuda" else CHIPS[chip_of(device)].multiprocessors


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
