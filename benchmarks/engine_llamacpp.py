"""llama.cpp (llama-cpp-python's low-level API) as a worker of the comparisons; see compare_worker.py.

Flags of this script beside serving: `--gguf CHECKPOINT OUT` and `--quantize IN OUT TYPE THREADS [pure] [IMATRIX.npz]`,
`--encode IN.npz OUT.npz TYPE`. It runs under the
peer's interpreter and imports nothing of halfbyte.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import compare_worker

UBATCH, BATCH = 512, 2048  # llama.cpp's own defaults


class LlamaCpp:
    """One model; one context a depth, since a context holds one cache."""

    def load(
        self,
        path: str,
        threads: int,
        cache: str = "f16",
        flash: str = "auto",
        repack: bool = True,
        states: str = "",
    ) -> dict[str, Any]:
        """cache: type of keys and values; flash: auto, on or off; repack: llama.cpp's default, else mapped only.

        states: a folder that keeps filled caches between runs, so that each is computed once.
        """
        import llama_cpp as lib

        self.lib, self.threads, self.flash = lib, threads, flash
        self.cache = getattr(lib, f"GGML_TYPE_{cache.upper()}")
        self.states = Path(states) / f"{cache}.{flash}.{lib.__version__}" if states else None
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.load_mode, params.use_extra_bufts = lib.LLAMA_LOAD_MODE_MMAP, repack
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        return {
            "vocab_size": lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)),
            "version": f"llama.cpp of llama-cpp-python {lib.__version__}",
            "cache": cache,
            "flash_attention": flash,
            "repack": repack,
            "n_ubatch": UBATCH,
            "weight_bytes": lib.llama_model_size(self.model),
            "system": lib.llama_print_system_info().decode(),
        }

    def _context(self, tokens: int) -> Any:
        lib = self.lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = -(-tokens // 256) * 256, BATCH, UBATCH
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = self.cache
        params.flash_attn_type = {
            "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
            "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }[self.flash]
        params.no_perf = True
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError(f"llama.cpp refuses a context of {tokens} tokens")
        return context

    def fill(self, ids: list[int], depths: list[int], room: int) -> dict[int, Any]:
        """Each context continues from the one before; what was computed in an earlier run is read."""
        caches: dict[int, Any] = {}
        before = 0
        for depth in depths:
            caches[depth] = context = self._context(depth + room)
            if not depth:
                continue
            path = self.states / f"{depth}.state" if self.states else None
            if path is None or not self._read(context, path):
                if before:
                    size = self.lib.llama_state_seq_get_size(caches[before], 0)
                    data = (ctypes.c_uint8 * size)()
                    self.lib.llama_state_seq_get_data(caches[before], data, size, 0)
                    self.lib.llama_state_seq_set_data(context, data, size, 0)
                self.feed(context, ids[before:depth])
                if path is not None:
                    self._write(context, path)
            before = depth
        return caches

    def _read(self, context: Any, path: Path) -> bool:
        count = ctypes.c_size_t()
        none = (self.lib.llama_token * 1)()
        name = str(path).encode()
        return path.exists() and bool(
            self.lib.llama_state_seq_load_file(context, name, 0, none, 1, ctypes.byref(count))
        )

    def _write(self, context: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        none = (self.lib.llama_token * 1)()
        if not self.lib.llama_state_seq_save_file(context, str(part).encode(), 0, none, 0):
            raise ValueError(f"llama.cpp cannot write {part}")
        os.replace(part, path)

    def feed(self, cache: Any, ids: list[int]) -> float:
        """See Engine. Logits of the last token only."""
        lib = self.lib
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            tokens = (lib.llama_token * len(part))(*part)
            status = lib.llama_decode(cache, lib.llama_batch_get_one(tokens, len(part)))
            if status:
                raise ValueError(f"llama_decode returns {status}")
        return float(lib.llama_get_logits_ith(cache, -1)[0])

    def rewind(self, cache: Any, depth: int) -> None:
        """See Engine."""
        memory = self.lib.llama_get_memory(cache)
        if not self.lib.llama_memory_seq_rm(memory, 0, depth, -1):
            raise ValueError(f"llama.cpp cannot go back to {depth} tokens")


def quantize(source: str, out: str, name: str, threads: str, *options: str) -> None:
    """`llama-quantize`'s defaults, for one of its type names.

    options: `pure`, the type for every matrix rather than its mixture; a `.npz` of float32[cols] by tensor name, the
    importance matrix: mean squares of the inputs.
    """
    import llama_cpp as lib
    import numpy as np

    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread, params.pure = int(threads), "pure" in options
    if params.pure:
        params.output_tensor_type = params.token_embedding_type = lib.GGML_TYPE_COUNT
    for path in (o for o in options if o.endswith(".npz")):
        given = {k: np.ascontiguousarray(v, np.float32) for k, v in np.load(path).items()}
        entries = (lib.llama_model_imatrix_data * (len(given) + 1))()  # ends with a null name
        for entry, (tensor, values) in zip(entries, given.items()):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source} to {name}")


def encode(source: str, out: str, name: str) -> None:
    """Matrices of a `.npz` quantised to one ggml type and decoded; `NAME importance` weighs the columns of NAME.

    Rows that are no multiple of the type's block are laid end to end until they are one.
    """
    import gguf
    import llama_cpp
    import numpy as np

    lib = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    given, read = np.load(source), {}

    def at(values: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(values.ctypes.data)

    for matrix in (n for n in given.files if not n.endswith(" importance")):
        w = np.ascontiguousarray(given[matrix], np.float32)
        joined = next(k for k in range(1, block + 1) if k * w.shape[1] % block == 0 and len(w) % k == 0)
        importance = f"{matrix} importance"
        weights = np.tile(given[importance].astype(np.float32), joined) if importance in given else None
        rows, cols = len(w) // joined, w.shape[1] * joined
        packed = np.zeros((rows, cols // block * nbytes), np.uint8)
        size = (ctypes.c_int64(v) for v in (0, rows, cols))
        lib.ggml_quantize_chunk(int(kind), at(w), at(packed), *size, None if weights is None else at(weights))
        read[matrix] = gguf.quants.dequantize(packed, kind).reshape(w.shape)
    np.savez(out, **read)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gguf"]:
        import gguf_checkpoint

        gguf_checkpoint.write(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--quantize"]:
        quantize(*sys.argv[2:])
    elif sys.argv[1:2] == ["--encode"]:
        encode(*sys.argv[2:5])
    else:
        compare_worker.serve(LlamaCpp())
