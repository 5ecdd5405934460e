"""OpenVINO's runtime on a stateful model as a worker of the comparisons; see compare_worker.py.

`--ir CHECKPOINT OUT MODE` makes the model instead. What GenAI's stateful pipeline does: one infer request, one
`infer` for the whole prompt, then one a token, logits of the last token. Runs under the peer's interpreter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compare_worker
import numpy as np

CHUNK = 1024  # tokens of a fill at once; a prefill that is timed goes in one piece


class Cache:
    """A request, the tokens in its state, and the state to go back to."""

    def __init__(self, request: Any):
        self.request, self.length = request, 0
        self.saved: dict[str, np.ndarray] = {}


class OpenVino:
    """One compiled model; a request a depth, since the state belongs to it."""

    def load(
        self, path: str, threads: int, precision: str = "", kv: str = "", dynamic: int | None = None
    ) -> dict[str, Any]:
        """precision, kv: f32, bf16, f16, u8; dynamic: group of activations (0: no dynamic quantisation)."""
        import openvino as ov

        self.ov = ov
        wanted: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        }  # fmt: skip
        if precision:
            wanted["INFERENCE_PRECISION_HINT"] = precision
        if kv:
            wanted["KV_CACHE_PRECISION"] = kv
        if dynamic is not None:
            wanted["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = dynamic
        core = ov.Core()
        self.compiled = core.compile_model(str(Path(path) / "openvino_model.xml"), "CPU", wanted)
        asked = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                 "INFERENCE_NUM_THREADS")  # fmt: skip
        return {
            "vocab_size": self.compiled.output(0).partial_shape[2].get_length(),
            "version": f"OpenVINO {ov.__version__}",
            "weight_bytes": (Path(path) / "openvino_model.bin").stat().st_size,
            **{key.lower(): str(self.compiled.get_property(key)) for key in asked},
        }

    def kinds(self) -> dict[str, int]:
        """How many nodes of each kind the compiled graph has: shows what was fused."""
        out: dict[str, int] = {}
        for node in self.compiled.get_runtime_model().get_ops():
            kind = node.get_rt_info()["layerType"]
            kind = kind if isinstance(kind, str) else str(kind.value)
            out[kind] = out.get(kind, 0) + 1
        return out

    def fill(self, ids: list[int], depths: list[int], room: int) -> dict[int, Any]:
        """Each request continues from the state of the one before."""
        caches: dict[int, Any] = {}
        before: Cache | None = None
        for depth in depths:
            caches[depth] = cache = Cache(self.compiled.create_infer_request())
            if not depth:
                continue
            if before is not None:
                self._restore(cache, before.saved, before.length)
            for at in range(cache.length, depth, CHUNK):
                self.feed(cache, ids[at : min(at + CHUNK, depth)])
            cache.saved = {s.name: np.array(s.state.data) for s in cache.request.query_state()}
            before = cache
        return caches

    def _restore(self, cache: Cache, saved: dict[str, np.ndarray], length: int) -> None:
        for state in cache.request.query_state():
            state.state = self.ov.Tensor(saved[state.name])
        cache.length = length

    def feed(self, cache: Cache, ids: list[int]) -> float:
        """See Engine."""
        end = cache.length + len(ids)
        found = cache.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(cache.length, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
            share_outputs=True,
        )
        cache.length = end
        return float(found[0][0, -1, 0])

    def rewind(self, cache: Cache, depth: int) -> None:
        """See Engine. The state is set to what was saved at this depth, as GenAI trims it."""
        if depth:
            self._restore(cache, cache.saved, depth)
        else:
            cache.request.reset_state()
            cache.length = 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ir"]:
        import openvino_ir

        openvino_ir.write(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        compare_worker.serve(OpenVino())
