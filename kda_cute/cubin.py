"""Read GPU code without a GPU: find cubins inside a file, and say what ptxas made of each kernel."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .kernels.config import KdaBuildConfig, KdaDecodeConfig, KdaFwdConfig

# Registers of a thread that may be spilled, for `kda-cute inspect` and the tests. ptxas spills a few that are needed
# once a chunk or a work item, other ones in each version; decoding, which many small blocks hide the way to memory for,
# may spill more.
MAX_SPILLS = {KdaFwdConfig: 10, KdaBuildConfig: 10, KdaDecodeConfig: 32}
MAX_SPILLS_OFFSETS = 24  # most of them before a piece's first chunk

EM_CUDA = 190
# From sm_90 on the system keeps the first KiB of a block's shared memory. ptxas counts it in .nv.shared of kernels that
# use any (500 floats make 3024 bytes); the limit of 227 KiB a block is what comes on top.
RESERVED_SMEM = 1024
EIATTR_REGCOUNT, EIATTR_FRAME_SIZE = 0x2F, 0x11


@dataclass
class Kernel:
    """One kernel of a cubin. `registers` is the count at entry, `setmaxnreg` what warp roles then switch to."""

    name: str
    registers: int
    stack: int
    static_smem: int
    opcodes: Counter[str] = field(repr=False)
    setmaxnreg: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        """Instructions whose name is `opcode`, whatever its suffixes: HGMMA counts HGMMA.64x32x16.F32.BF16."""
        return sum(n for name, n in self.opcodes.items() if name.split(".")[0] == opcode)

    @property
    def spills(self) -> int:
        """Registers' worth of local memory that a thread has: spilled registers, or arrays indexed at run time."""
        return -(-self.stack // 4)


def max_spills(config: Any) -> int:
    if getattr(config, "checkpoints", "") == "offsets":
        return MAX_SPILLS_OFFSETS
    return MAX_SPILLS.get(type(config), 0)


def extract(data: bytes) -> list[bytes]:
    """The cubins embedded in an object, a shared library or a fat binary."""
    found, at = [], 0
    while (at := data.find(b"\x7fELF", at)) >= 0:
        if data[at + 18 : at + 20] == struct.pack("<H", EM_CUDA):
            phoff, shoff = struct.unpack_from("<QQ", data, at + 32)
            phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", data, at + 54)
            size = max(phoff + phentsize * phnum, shoff + shentsize * shnum)  # the header tables come last
            found.append(data[at : at + size])
        at += 4
    return found


def sm(cubin: bytes) -> int:
    """90 for sm_90 and sm_90a. ELF ABI 8 moved it up one byte."""
    flags = struct.unpack_from("<I", cubin, 48)[0]
    return flags & 0xFF if cubin[8] < 8 else flags >> 8 & 0xFF


def nvdisasm() -> str:
    """The disassembler: from PATH, or from the nvidia-cuda-nvdisasm package."""
    if on_path := shutil.which("nvdisasm"):
        return on_path
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        for path in Path(site).glob("nvidia/*/bin/nvdisasm"):
            return str(path)
    raise FileNotFoundError("nvdisasm not found: pip install nvidia-cuda-nvdisasm (or kda-cute[inspect])")


def kernels(cubin: bytes) -> list[Kernel]:
    sections = _sections(cubin)
    names = _symbols(cubin, sections)
    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    info = sections[".nv.info"]
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # only form 4 carries `size` bytes, the others hold their value in the size field
            continue
        if attribute in (EIATTR_REGCOUNT, EIATTR_FRAME_SIZE):
            symbol, value = struct.unpack_from("<II", info, at)
            (registers if attribute == EIATTR_REGCOUNT else stack)[names[symbol]] = value
        at += size
    result = []
    for name, code in _disassemble(cubin).items():
        smem = len(sections.get(f".nv.shared.{name}", b""))
        if smem and sm(cubin) >= 90:
            smem -= RESERVED_SMEM
        opcodes = Counter(op for op, _ in code)
        # USETMAXREG.DEALLOC.CTAPOOL 0x18 and USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
        setmaxnreg = [int(args.split(",")[-1], 0) for op, args in code if op.startswith("USETMAXREG")]
        result.append(Kernel(name, registers[name], stack.get(name, 0), smem, opcodes, setmaxnreg))
    return result


def texts(cubin: bytes) -> dict[str, bytes]:
    """Kernel name -> its instructions as they are."""
    return {name.removeprefix(".text."): x for name, x in _sections(cubin).items() if name.startswith(".text.")}


def disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([nvdisasm(), "-c", f.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def _disassemble(cubin: bytes) -> dict[str, list[tuple[str, str]]]:
    """Kernel name -> (opcode, operands) of each instruction."""
    code: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in disassembly(cubin).splitlines():
        if m := re.match(r"\s*\.section\s+\.text\.([^,]+),", line):
            current = code.setdefault(m[1].strip('"'), [])
        elif m := re.match(
            r"\s*(?:\{|/\*[0-9a-f]{4,}\*/)\s*(?:\{\s*)?(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", line
        ):
            current.append((m[1], m[2]))
    return code


def _sections(elf: bytes) -> dict[str, bytes]:
    (shoff,) = struct.unpack_from("<Q", elf, 40)
    entsize, count, strings = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, shoff + i * entsize) for i in range(count)]
    names = elf[headers[strings][4] :]
    result = {}
    for name, kind, _, _, offset, size, *_ in headers:
        body = bytes(size) if kind == 8 else elf[offset : offset + size]  # 8: NOBITS, a size without bytes
        result[names[name : names.index(b"\0", name)].decode()] = body
    return result


def _symbols(elf: bytes, sections: dict[str, bytes]) -> list[str]:
    table, strings = sections[".symtab"], sections[".strtab"]
    offsets = [struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24)]
    return [strings[at : strings.index(b"\0", at)].decode() for at in offsets]
