"""The native backend: the C library of `native/`, called through cffi in ABI mode.

The declarations are read from the public header, the weights are pointers into the file's mapping, and
one call runs the whole program.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.formats.encodings import BY_NAME, SCALE_TYPES
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.backends.backend import Backend, Step
from halfbyte.runtime.kv import KV

_ROOT = Path(__file__).resolve().parents[2]  # the package: the repository, or site-packages/halfbyte
_LIBRARY = {"darwin": "libhalfbyte.dylib", "win32": "halfbyte.dll"}.get(sys.platform, "libhalfbyte.so")
ISA_BEST = -1


def library_path() -> Path | None:
    """Where the compiled library is, or None: $HALFBYTE_LIBRARY, the installed one, or the newest built here.

    An editable install and `make native` each build into a folder of their own under build/.
    """
    if named := os.environ.get("HALFBYTE_LIBRARY"):
        return Path(named)
    if (_ROOT / "native" / _LIBRARY).is_file():
        return _ROOT / "native" / _LIBRARY
    built = _ROOT.glob(f"build/*/{_LIBRARY}")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def declarations() -> str:
    """The C declarations of the public headers, without preprocessor lines."""
    lines: list[str] = []
    for name in ("halfbyte.h", "halfbyte_tokenizer.h", "halfbyte_ops.h", "halfbyte_program.h"):
        skip = 0  # inside #ifdef __cplusplus
        for line in (_ROOT / "native" / "include" / name).read_text(encoding="utf-8").splitlines():
            if line.startswith("#ifdef __cplusplus"):
                skip = 1
            elif line.startswith("#endif"):
                skip = 0
            elif not line.startswith("#") and not skip:
                lines.append(line.replace("HB_API ", ""))
    return "\n".join(lines)


def load_library() -> tuple[Any, Any]:
    """(ffi, lib). Raises UsageError when the library is absent, unreadable or of another version."""
    path = library_path()
    if path is None:
        raise UsageError(
            "the native library is not built; run `make native`, or use --backend jit (HALFBYTE_LIBRARY names another)"
        )
    return _load(path)


@lru_cache(maxsize=4)
def _load(path: Path) -> tuple[Any, Any]:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declarations())
    try:
        lib = ffi.dlopen(str(path))
        version = lib.hb_abi_version()
    except (OSError, AttributeError) as error:
        raise UsageError(f"cannot load the native library {path}: {error}") from None
    if version != lib.HB_ABI_VERSION:
        raise UsageError(
            f"the native library {path} has interface {version}, not {lib.HB_ABI_VERSION}; rebuild it"
        )
    return ffi, lib


def isa_number(name: str | None = None) -> int:
    """The number of an instruction set by name, by default of $HALFBYTE_ISA, or ISA_BEST when neither is given.

    Raises UsageError for a name that is unknown or that this machine does not support.
    """
    name = os.environ.get("HALFBYTE_ISA") if name is None else name
    if not name:
        return ISA_BEST
    ffi, lib = load_library()
    names = [ffi.string(lib.hb_isa_name(i)).decode() for i in range(lib.HB_ISA_COUNT)]
    usable = [n for i, n in enumerate(names) if lib.hb_isa_supported(i)]
    if name not in names:
        raise UsageError(f"HALFBYTE_ISA={name} is not known; there are {', '.join(names)}")
    if name not in usable:
        raise UsageError(f"HALFBYTE_ISA={name}: this machine has only {', '.join(usable)}")
    return names.index(name)


def kernels(isa: int = ISA_BEST) -> list[dict[str, Any]]:
    """The kernel table: op, family, isa, name, supported, chosen (by dispatch limited to `isa`)."""
    ffi, lib = load_library()
    info = ffi.new("hb_kernel_info *")
    rows = []
    for i in range(lib.hb_kernel_count()):
        lib.hb_kernel_info_at(i, isa, info)
        text = {k: ffi.string(getattr(info, k)).decode() for k in ("op", "family", "isa", "name")}
        rows.append({**text, "supported": bool(info.supported), "chosen": bool(info.chosen)})
    return rows


class Native(Backend):
    """Runs a program in the C library. The results do not depend on `threads`."""

    name = "native"
    threads: int

    def bind(self) -> None:
        """Hand the tables and the addresses of the weights to the library."""
        self._ffi, self._lib = ffi, lib = load_library()
        self._isa = isa_number()
        pool = lib.hb_pool_create(self.threads)
        if pool == ffi.NULL:
            raise HalfbyteError(f"cannot start {self.threads} threads")
        self._pool = ffi.gc(pool, lib.hb_pool_free)
        self.threads = lib.hb_pool_threads(pool)
        f = self.file
        weights = ffi.new("hb_weight[]", max(1, len(f.tensors)))
        base = ffi.cast("uint8_t *", ffi.from_buffer(f.bytes))
        for w, t in zip(weights, f.tensors):
            w.data, w.nbytes, w.encoding, w.tile = base + t.offset, t.nbytes, BY_NAME[t.encoding].code, t.tile
            w.rows, w.cols = t.shape if len(t.shape) == 2 else (1, t.shape[0])
            w.group, w.scale_type = t.group, SCALE_TYPES[t.scale_type]
        tables = [np.ascontiguousarray(a) for a in (f.program, f.slots, f.caches)]
        arguments: list[Any] = []
        for kind, table in zip(("hb_op", "hb_slot", "hb_cache"), tables):
            arguments += [ffi.cast(f"{kind} *", table.ctypes.data), len(table)]
        error = ffi.new("char[256]")
        policy = {"f32": lib.HB_POLICY_F32, "i8g32": lib.HB_POLICY_I8G32}[self.policy]
        program = lib.hb_bind(*arguments, weights, len(f.tensors), policy, self._isa, pool, error, 256)
        if program == ffi.NULL:
            raise UsageError(f"the native backend cannot run this file: {ffi.string(error).decode()}")
        self._program = ffi.gc(program, lib.hb_free)
        self._step = ffi.new("hb_step *")
        self._slot_base = ffi.new("float *[]", max(1, len(f.slots)))
        self._step.slot_base = self._slot_base
        self._slots_of: object = None
        self._tables: list[np.ndarray] = []  # page tables that the step points at
        self._rows = np.empty((4, 0), np.int32)  # ids, positions, sessions and picks of the step

    def _point_at_arena(self) -> None:
        if self._slots_of is not self.arena:
            for i, s in enumerate(self.file.slots):
                if int(s["base"]) == i:
                    self._slot_base[i] = self._ffi.cast("float *", self.arena.base(i).ctypes.data)
            self._slots_of = self.arena

    def _point_at_caches(self, kvs: Sequence[KV]) -> None:
        tables = [kv.table for kv in kvs]
        if len(tables) == len(self._tables) and all(map(operator.is_, tables, self._tables)):
            return
        ffi, s = self._ffi, self._step
        self._caches = ffi.new("hb_kv[]", max(1, len(kvs)))
        for row, kv in zip(self._caches, kvs):
            row.pages = ffi.cast("void **", kv.table.ctypes.data)
            row.types = ffi.cast("uint32_t *", kv.words.ctypes.data)
            row.page_count = kv.table.shape[1]
        s.kv, s.kv_count, self._tables = self._caches, len(kvs), tables

    def _copy_rows(self, step: Step) -> None:
        rows, picks = step.rows, len(step.picks)
        if max(rows, picks) > self._rows.shape[1]:
            self._rows = np.empty((4, max(rows, picks)), np.int32)
            self._step.ids, self._step.positions, self._step.sessions, self._step.pick_rows = (
                self._ffi.cast("int32_t *", a.ctypes.data) for a in self._rows
            )
        to = self._rows
        to[0, :rows], to[1, :rows], to[2, :rows] = step.ids, step.positions, step.sessions
        to[3, :picks] = step.picks
        self._step.rows, self._step.picks = rows, picks

    def run_range(self, step: Step, first: int, last: int) -> None:
        """One call of the library. Raises UsageError for an id, session, position or pick out of range."""
        self._point_at_arena()
        self._point_at_caches(step.kvs)
        self._copy_rows(step)
        status = self._lib.hb_run(self._program, self._step, first, last)
        if status:
            if status == self._lib.HB_ERROR_MEMORY:
                raise HalfbyteError(f"out of memory for a step of {step.rows} rows")
            raise UsageError(self._ffi.string(self._lib.hb_status_text(status)).decode())

    def describe(self) -> dict[str, object]:
        """Adds the library, its instruction set and the kernel of every op and family."""
        chosen = {f"{k['op']}.{k['family']}": k["name"] for k in kernels(self._isa) if k["chosen"]}
        if self._isa == ISA_BEST:
            isa = next(k["isa"] for k in kernels() if k["supported"])  # the table is in order of preference
        else:
            isa = self._ffi.string(self._lib.hb_isa_name(self._isa)).decode()
        return {
            **super().describe(),
            "library": str(library_path()),
            "isa": isa,
            "kernels": chosen,
        }
