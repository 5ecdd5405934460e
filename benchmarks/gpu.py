"""The cuda backend on a GPU: tokens/s, TFLOP/s and share of peak in bf16 and f8, and parity with the CPU.

    python benchmarks/gpu.py                          on a GPU (H100, H200): 1B and 7B shapes, random weights
    python benchmarks/gpu.py --parity FILE.hb ...     and parity of files, CPU i8g32 against GPU f8 and bf16
    python benchmarks/gpu.py --device cpu --tiny      the same code on PyTorch's CPU, to see that it runs

The matrices of a model are made on the device, and a step is what the program of such a model does: the linears of
every layer and the head through the backend's own functions, norms and attention as in a llama. The names of the
kernels that ran come from PyTorch's profiler: they are the proof that FP8 ran on tensor cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.runtime.backends import cuda
from halfbyte.runtime.parity import compare

# hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, 64, 128256),
    "7B": (4096, 14336, 32, 32, 8, 128, 32000),
    "tiny": (64, 128, 2, 4, 2, 16, 256),
}
PEAK = {"H100": {"bf16": 989e12, "f8": 1979e12}, "H200": {"bf16": 989e12, "f8": 1979e12}}  # dense, SXM
CONTEXT = 512  # positions in the cache of a decoding step


class Llama:
    """Random weights of a shape, and a step over them by the functions of the cuda backend."""

    def __init__(self, shape: tuple[int, ...], policy: str, device: torch.device):
        hidden, inner, layers, heads, kv_heads, dim, vocab = shape
        self.policy, self.device, self.heads, self.kv_heads, self.dim = policy, device, heads, kv_heads, dim
        sizes = [
            ((heads + 2 * kv_heads) * dim, hidden),
            (hidden, heads * dim),
            (2 * inner, hidden),
            (hidden, inner),
        ]
        self.layers = [[self._matrix(*s) for s in sizes] for _ in range(layers)]
        self.head = self._matrix(vocab, hidden)
        self.hidden = hidden
        self.products = layers * sum(r * c for r, c in sizes) + vocab * hidden  # of one token

    def _matrix(self, rows: int, cols: int) -> Any:
        w = torch.randn(rows, cols, device=self.device) / cols**0.5
        return w.to(torch.bfloat16) if self.policy == "bf16" else cuda.to_f8(w)

    def _linear(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        if self.policy == "bf16":
            return (x.to(torch.bfloat16) @ w.T).float()
        return cuda.linear_f8(x, *w)

    def step(self, batch: int, rows: int, past: int) -> torch.Tensor:
        """rows tokens of each of `batch` sessions after `past` positions; logits of the last of each."""
        x = torch.randn(batch * rows, self.hidden, device=self.device)
        for qkv, out, gate_up, down in self.layers:
            h = torch.nn.functional.rms_norm(x, (self.hidden,))
            y = self._linear(h, qkv).reshape(batch, rows, -1, self.dim).transpose(1, 2)
            q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            if past:
                old = torch.zeros(batch, self.kv_heads, past, self.dim, device=self.device)
                k, v = torch.cat([old, k], 2), torch.cat([old, v], 2)
            share = self.heads // self.kv_heads
            k, v = (a.repeat_interleave(share, 1).to(torch.bfloat16) for a in (k, v))
            a = torch.nn.functional.scaled_dot_product_attention(
                q.to(torch.bfloat16), k, v, is_causal=not past
            )
            x = x + self._linear(a.float().transpose(1, 2).reshape(batch * rows, -1), out)
            gate, up = self._linear(torch.nn.functional.rms_norm(x, (self.hidden,)), gate_up).chunk(2, 1)
            x = x + self._linear(torch.nn.functional.silu(gate) * up, down)
        return self._linear(x.reshape(batch, rows, -1)[:, -1], self.head)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call."""
    import time

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for i in range(repeats + 2):
        sync()
        start = time.perf_counter()
        work()
        sync()
        if i > 1:  # the first ones choose algorithms
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def kernels(work: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the matrix kernels that ran, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        work()
    rows = sorted(found.key_averages(), key=lambda r: -getattr(r, "self_device_time_total", 0))
    marks = ("gemm", "cutlass", "nvjet", "sm90", "scaled_mm", "addmm", "mm")
    return [r.key for r in rows if any(m in r.key.lower() for m in marks)][:4]


@torch.no_grad()
def measure(name: str, policy: str, device: torch.device, prefill: int, repeats: int) -> list[dict[str, Any]]:
    """Prefill of one prompt, and decoding of 1 and 64 sessions."""
    model = Llama(SHAPES[name], policy, device)
    peak = next((p[policy] for gpu, p in PEAK.items() if gpu in device_label(device)), None)
    rows = []
    for what, batch, tokens, past in (
        ("prefill", 1, prefill, 0),
        ("decode", 1, 1, CONTEXT),
        ("decode", 64, 1, CONTEXT),
    ):

        def work(batch: int = batch, tokens: int = tokens, past: int = past) -> torch.Tensor:
            return model.step(batch, tokens, past)

        t = seconds(work, device, repeats)
        head = SHAPES[name][-1] * SHAPES[name][0]
        flop = 2 * batch * (tokens * (model.products - head) + head)
        row = {"shape": name, "policy": policy, "what": what, "batch": batch, "tokens": tokens, "ms": 1e3 * t,
               "tokens_per_s": batch * tokens / t, "tflops": flop / t / 1e12}  # fmt: skip
        row["share_of_peak"] = flop / t / peak if peak else None
        row["kernels"] = kernels(work, device)
        rows.append(row)
    return rows


def device_label(device: torch.device) -> str:
    """The name of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.processor()}"


def main() -> None:
    """Measure and print; JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=cuda.device_name())
    parser.add_argument("--tiny", action="store_true", help="a toy shape")
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--parity", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--text", type=Path, help="what both read in the parity runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result: dict[str, Any] = {
        "device": device_label(device),
        "torch": torch.__version__,
        "commit": commit,
        "speed": [],
    }
    print(f"{result['device']}, torch {torch.__version__}, commit {commit}")
    for shape in ["tiny"] if args.tiny else ["1B", "7B"]:
        for policy in ("bf16", "f8"):
            prefill = min(args.prefill, 64) if args.tiny else args.prefill
            for row in measure(shape, policy, device, prefill, args.repeats):
                result["speed"].append(row)
                share = f"{100 * row['share_of_peak']:5.1f} % of peak" if row["share_of_peak"] else ""
                size = f"batch {row['batch']:3} x {row['tokens']:5}"
                speed = f"{row['tokens_per_s']:10.0f} tokens/s {row['tflops']:8.2f} TFLOP/s"
                print(f"{shape:5} {policy:5} {row['what']:8} {size}: {speed} {share}  {row['kernels'][:1]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        by = {
            r["policy"]: r["tokens_per_s"]
            for r in result["speed"]
            if r["shape"] == shape and r["what"] == "prefill"
        }
        print(f"{shape:5} prefill: f8 is {by['f8'] / by['bf16']:.2f} times bf16")
    text = args.text.read_text(encoding="utf-8") if args.text else None
    result["parity"] = []
    for file in args.parity:
        for policy in ("i8g32", "bf16", "f8"):
            found = compare(file, ("native", "i8g32"), ("cuda", policy), text=text)
            result["parity"].append(found)
            print(f"{Path(file).name:24} native i8g32 / cuda {policy:5}: KL {found['kld_mean']:.2e}, "
                  f"top-1 {100 * found['top1_agreement']:.1f} %, {'ok' if found['ok'] else 'EXCEEDED'}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
