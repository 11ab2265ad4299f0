"""What the machine code of a compiled kernel says: spills, registers, tensor cores, wide loads, atomics.

`read_nvidia` reads SASS (nvdisasm) and the log of ptxas, `read_amd` the AMDGCN text of LLVM. They count instructions in
the code as it stands, not how often they run. Pure functions of text; compiling is `compile_report`'s business.
"""

import re
from collections import Counter
from dataclasses import dataclass

# "        /*00f0*/              @!P0 BRA `(.L_x_2) ;" and "\tglobal_load_dwordx4 v[2:5], v[2:3], off"
_SASS_OPERATION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_AMD_OPERATION = re.compile(r"^\s+([a-z][a-z0-9]*_[a-z0-9_]+)", re.MULTILINE)

_SASS_SPILLS = re.compile(r"(STL|LDL)\b")
_SASS_TENSOR_CORES = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
# Global memory to registers or shared memory by 16 bytes a thread or more, or by the copy engine. A plain "128" is not
# enough: LTC128B in a name is a hint to the cache.
_SASS_WIDE_LOADS = re.compile(r"(LDG|LDGSTS)\.(\S+\.)?(128|256)\b|UTMALDG\b|UBLKCP\b")
# Not ATOMS: on sm_100 the allocation of tensor memory counts with it in shared memory, in a fixed order.
_SASS_ATOMICS = re.compile(r"(ATOM|ATOMG|RED|REDG|UTMAREDG|UBLKRED)\b")

_AMD_SPILLS = re.compile(r"scratch_(load|store)")
_AMD_TENSOR_CORES = re.compile(r"v_s?mfma")
_AMD_WIDE_LOADS = re.compile(r"(global|buffer)_load(_lds)?_dwordx4$")
_AMD_ATOMICS = re.compile(r"(global|buffer|flat)_atomic")

_TRITON_ATOMICS = re.compile(r"\btt\.(atomic_\w+|descriptor_reduce)\b")


@dataclass(frozen=True)
class Reading:
    """What one compiled kernel is made of."""

    spills: int
    """Instructions that move registers to memory and back; on AMD also scalar registers that were moved."""
    registers: int
    """Vector registers a thread holds."""
    tensor_core_ops: int
    """Matrix instructions."""
    wide_loads: int
    """Loads from global memory of 16 bytes a thread, or by the copy engine (TMA)."""
    atomics: int
    """On global memory: in the machine code, or in Triton's intermediate form where that has more."""
    serialized: bool
    """ptxas runs the matrix instructions of Hopper (wgmma) one after another."""


def read_nvidia(sass: str, ptxas_log: str, triton_ir: str) -> Reading:
    """Read what `nvdisasm -c -ndf` prints of a cubin and what `ptxas -v` said when it made it.

    Raises ValueError when either lacks what is looked for: a count of 0 must mean that there is nothing.
    """
    registers = re.search(r"Used (\d+) registers", ptxas_log)
    operations = Counter(_SASS_OPERATION.findall(sass))
    if registers is None or "EXIT" not in operations:
        raise ValueError("ptxas or nvdisasm printed something else than expected: has their version changed?")
    return Reading(
        spills=_count(_SASS_SPILLS, operations),
        registers=int(registers[1]),
        tensor_core_ops=_count(_SASS_TENSOR_CORES, operations),
        wide_loads=_count(_SASS_WIDE_LOADS, operations),
        atomics=max(_count(_SASS_ATOMICS, operations), len(_TRITON_ATOMICS.findall(triton_ir))),
        serialized="serialized" in ptxas_log,
    )


def read_amd(amdgcn: str, triton_ir: str) -> Reading:
    """Read the assembly text that LLVM wrote, with its metadata of the kernel. Raises ValueError as `read_nvidia`."""
    operations = Counter(_AMD_OPERATION.findall(amdgcn))
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", amdgcn))
    if len(found) < 3 or "s_endpgm" not in operations:
        raise ValueError("LLVM wrote something else than expected for AMD: has Triton's version changed?")
    return Reading(
        spills=max(int(found["vgpr_spill_count"]), _count(_AMD_SPILLS, operations)) + int(found["sgpr_spill_count"]),
        registers=int(found["vgpr_count"]),
        tensor_core_ops=_count(_AMD_TENSOR_CORES, operations),
        wide_loads=_count(_AMD_WIDE_LOADS, operations),
        atomics=max(_count(_AMD_ATOMICS, operations), len(_TRITON_ATOMICS.findall(triton_ir))),
        serialized=False,
    )


def _count(pattern: re.Pattern[str], operations: Counter[str]) -> int:
    return sum(times for operation, times in operations.items() if pattern.match(operation))
