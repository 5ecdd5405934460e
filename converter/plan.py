"""How the matrices of a conversion are quantised: which method, on which text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.assemble import Planes, Write, assemble, encode
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.quantizers import gptq
from halfbyte.converter.recipe import recipe
from halfbyte.converter.weights import Weights
from halfbyte.formats.errors import UsageError

# A model of up to this many weights also writes calibration text itself: a float file of 200 MB and some seconds.
OWN_TEXT_WEIGHTS = 50_000_000
OWN_SHARE = 0.75  # of the sequences, where there are both
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
    ):
        self.b, self.weights, self.calibrate = b, weights, calibrate
        self.tokenizer, self.template, self.meta = tokenizer, template, dict(meta)
        rounds = any(
            isinstance(t, Matrix) and not t.storage.packed and gptq.supports(t.storage.encoding)
            for t in b.tensors
        )
        if not tokenizer and (method == "gptq" or calibrate is not None):
            raise UsageError(
                "calibration needs a tokenizer, and the model has none; see --tokenizer, or --method rtn"
            )
        if not rounds and (method == "gptq" or calibrate is not None):
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
            self._float_file(path)
            written = c.own_text(path, self.b.context_limit, own)
        if written:
            keep = np.unique(np.linspace(0, len(given) - 1, c.SEQUENCES - own).astype(int))
            given = [given[i] for i in keep]
        return written + given

    def _float_file(self, path: Path) -> None:
        """The same model in f32."""
        from halfbyte.converter import models

        b = Builder(self.b.checkpoint, recipe("f32"), self.b.context)
        models.build(b)
        assemble(b, path, self.meta, self.tokenizer, "", lambda name, weights: None)

    def quantizer(
        self, folder: str | os.PathLike[str], progress: Progress | None
    ) -> Callable[[Write], set[int]] | None:
        """What quantises matrices by this plan, None for plain rounding to nearest."""
        if self.method == "rtn":
            return None if self.calibrate is None else lambda write: self._importance(write, progress)

        def run(write: Write) -> set[int]:
            from halfbyte.converter import sequential

            return sequential.quantize(
                self.b, self.weights, self.sequences(Path(folder)), write, progress=progress
            )

        return run

    def _importance(self, write: Write, progress: Progress | None) -> set[int]:
        """Round to nearest, every column weighted by the mean square of its input."""
        from halfbyte.converter.calibrate import Calibration, Statistics

        index = {t.name: i for i, t in enumerate(self.b.tensors)}
        done: set[int] = set()

        def visit(t: Matrix, s: Statistics) -> None:
            if t.storage.packed:
                return
            done.add(index[t.name])

            def each(row: int, planes: Planes) -> None:
                write(index[t.name], row, planes)

            encode(t, self.weights, each, s.square)

        Calibration(self.b, self.weights, self.sequences(None)).run(visit, hessians=False, progress=progress)
        return done
