"""How the matrices of a conversion are quantised: which method, on which text."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.converter.assemble import Planes, Sink, assemble_float
from halfbyte.converter.blas import Products, spans
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibration.cuts import EMBED
from halfbyte.converter.calibration.statistics import Statistics
from halfbyte.converter.quantizers import _planes, gptq
from halfbyte.converter.weights import Weights
from halfbyte.formats.encodings import BY_NAME
from halfbyte.formats.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.converter.calibrate import Calibration

# A model of up to this many weights also writes calibration text itself: a float file of 200 MB and some seconds.
OWN_TEXT_WEIGHTS = 50_000_000
OWN_SHARE = 0.75  # of the sequences, where there are both
BLOCK_WEIGHTS, ROWS = 1 << 24, 128  # weights of a matrix in work at once, in multiples of so many rows
CALIBRATED = ("gptq", "awq", "autoround")
HELD_OUT = 8  # of so many sequences one is kept for measuring, where no held-out text is given

Progress = Callable[[str, int, int], None]


class Plan:
    """Decided before anything is written; `quantizer` then gives what `assemble` calls.

    Raises UsageError for a method that the model or the recipe does not allow.
    """

    def __init__(
        self,
        b: Builder,
        weights: Weights,
        method: str,
        calibrate: Path | None,
        tokenizer: bytes,
        template: str,
        meta: Mapping[str, Any],
        smooth: bool = False,
    ):
        self.b, self.weights, self.calibrate = b, weights, calibrate
        self.tokenizer, self.template, self.meta = tokenizer, template, dict(meta)
        rounds = any(
            isinstance(t, Matrix) and not t.storage.packed and gptq.supports(t.storage.encoding)
            for t in b.tensors
        )
        self.smooth = smooth
        self.memory: int | None = None  # bytes of activations to hold; None for what `Calibration` does
        calibrates = method in CALIBRATED or smooth or calibrate is not None
        if not tokenizer and calibrates:
            raise UsageError(
                "calibration needs a tokenizer, and the model has none; see --tokenizer, or --method rtn"
            )
        if not rounds and calibrates:
            raise UsageError(f"recipe {b.recipe.name} rounds nothing that calibration could improve")
        self.method = method
        if method == "auto":
            self.method = "gptq" if rounds and tokenizer else "rtn"
        self._found: list[list[int]] | None = None
        if calibrate is not None:
            self.sequences(None)  # a file that cannot be used is found at once

    def sequences(self, folder: Path | None) -> list[list[int]]:
        """Token ids to calibrate on; `folder` is where a float file may be written, None for nowhere."""
        if self._found is None:
            self._found = self._sequences(folder)
        return self._found

    def hold_out(self, folder: Path, text: Path | None) -> list[list[int]]:
        """Token ids to measure on: those of a text, else every HELD_OUT-th sequence, no longer calibrated on.

        Raises UsageError for a text that cannot be used, and where there is too little to part with.
        """
        from halfbyte.converter import calibrate as c

        if text is not None:
            tokenizer = c.tokenizer_of(self.tokenizer, self.meta)
            return c.sequences(tokenizer, self.template, text, self.b.context_limit)
        found = self.sequences(folder)
        if len(found) < HELD_OUT:
            raise UsageError("too little text to hold some of it out for measuring; give --heldout TEXT")
        self._found = [s for i, s in enumerate(found) if i % HELD_OUT != HELD_OUT - 1]
        return found[HELD_OUT - 1 :: HELD_OUT]

    def _sequences(self, folder: Path | None) -> list[list[int]]:
        from halfbyte.converter import calibrate as c

        tokenizer = c.tokenizer_of(self.tokenizer, self.meta)
        given = c.sequences(tokenizer, self.template, self.calibrate, self.b.context_limit)
        weights = sum(int(np.prod(t.shape)) for t in self.b.tensors)
        if self.calibrate is not None or folder is None or weights > OWN_TEXT_WEIGHTS:
            return given
        own = round(OWN_SHARE * c.SEQUENCES)
        with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
            path = Path(temporary) / "float.hb"
            assemble_float(self.b, path, self.meta, self.tokenizer, self.weights)
            written = c.own_sequences(path, self.b.context_limit, own)
        if written:
            keep = np.unique(np.linspace(0, len(given) - 1, c.SEQUENCES - own).astype(int))
            given = [given[i] for i in keep]
        return written + given

    def prepare(self, folder: Path, progress: Progress | None) -> None:
        """Fold into the program what the method folds before anything is rounded: smoothing, AWQ's scales."""
        if not self.smooth and self.method != "awq":
            return
        from halfbyte.converter.fold import Fold
        from halfbyte.converter.quantizers import awq, smoothquant

        self.sequences(folder)
        fold = Fold(self.b)
        self.weights = Weights(self.b)
        if self.smooth:
            smoothquant.apply(fold, self._calibration(folder), progress=progress)
        if self.method == "awq":
            counts = Counter(t.storage.encoding for t in self._rounded())
            coder = _coder(counts.most_common(1)[0][0])
            awq.apply(fold, self._calibration(folder), coder, progress)

    def _calibration(self, folder: Path) -> Calibration:
        from halfbyte.converter.calibrate import ACTIVATIONS, Calibration

        memory = ACTIVATIONS if self.memory is None else self.memory
        return Calibration(self.b, self.weights, self.sequences(folder), folder=folder, memory=memory)

    def _rounded(self) -> list[Matrix]:
        """The matrices that get new codes."""
        return [
            t
            for t in self.b.tensors
            if isinstance(t, Matrix) and not t.storage.packed and BY_NAME[t.storage.encoding].has_codes
        ]

    def quantizer(
        self, folder: str | os.PathLike[str], progress: Progress | None
    ) -> Callable[[Sink], set[int]] | None:
        """What quantises matrices by this plan, None for plain rounding to nearest."""
        if self.method == "rtn" and self.calibrate is None:
            return None
        if self.method != "gptq":
            return lambda sink: self._one_by_one(sink, Path(folder), progress)

        def run(sink: Sink) -> set[int]:
            from halfbyte.converter import sequential

            c = self._calibration(Path(folder))
            return sequential.quantize(c, sink, progress=progress)

        return run

    def _one_by_one(self, sink: Sink, folder: Path, progress: Progress | None) -> set[int]:
        """Every matrix by itself on the statistics of its inputs: weighted rounding, AWQ's clipping, learned rounding.

        Learned rounding shows its result to the later layers.
        """
        index = {t.name: i for i, t in enumerate(self.b.tensors)}
        rounded = {t.name for t in self._rounded() if index[t.name] not in sink.whole}
        records, _, _ = self.b.finish()
        looked_up = {int(r["w"][0]) for r in records if int(r["code"]) == EMBED}
        learned = self.method == "autoround"
        done: set[int] = set()

        def stored(t: Matrix) -> np.ndarray | None:
            return sink.stored(index[t.name]) if learned and index[t.name] in sink.whole else None

        def visit(t: Matrix, s: Statistics) -> np.ndarray | None:
            if t.name not in rounded:
                return None
            i = index[t.name]
            done.add(i)
            out = []
            for block in spans(t.shape[0], max(ROWS, BLOCK_WEIGHTS // t.shape[1] // ROWS * ROWS)):
                w = self.weights.rows(t, block.start, block.stop)
                planes = self._planes(w, t.storage.encoding, s, i in looked_up)
                sink(i, block.start, planes)
                if learned:
                    out.append(_planes.decode(planes, t.storage.encoding))
            return np.concatenate(out) if learned else None

        calibration = self._calibration(folder)
        calibration.run(visit, hessians=self.method != "rtn", only=rounded, stored=stored, progress=progress)
        return done

    def _planes(self, w: np.ndarray, encoding: str, s: Statistics, table: bool) -> Planes:
        if self.method == "rtn":
            return _planes.nearest(w, encoding, importance=s.square)
        assert s.hessian is not None
        if self.method == "autoround":
            from halfbyte.converter.quantizers import autoround
            from halfbyte.converter.sequential import TIED_DAMPING

            damping = TIED_DAMPING if table else autoround.DAMPING
            return autoround.quantize(w, encoding, s.hessian, damping=damping)
        from halfbyte.converter.quantizers import awq

        with Products() as products:
            w = awq.clip(w, s.hessian, _coder(encoding), products)
        return _planes.nearest(w, encoding, importance=s.square)


def _coder(encoding: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What is read back of weights rounded to nearest, columns weighted."""

    def code(w: np.ndarray, importance: np.ndarray) -> np.ndarray:
        return _planes.decode(
            _planes.nearest(w, encoding, importance=np.ascontiguousarray(importance)), encoding
        )

    return code
