"""One training from end to end: open, train, write the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from halfbyte import converter
from halfbyte.converter import models
from halfbyte.converter.assemble import Sink, assemble
from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.plan import Plan
from halfbyte.converter.proof import prover
from halfbyte.converter.qat.fake_quant import Planes
from halfbyte.converter.qat.graph import Graph
from halfbyte.converter.qat.options import Options, source_recipe, store
from halfbyte.converter.qat.text import sequences
from halfbyte.converter.qat.training import Progress, Result, Trainer
from halfbyte.converter.quantizers import gptq
from halfbyte.converter.unfinished import files_in, identity
from halfbyte.converter.weights import Weights
from halfbyte.formats.container import File
from halfbyte.formats.encodings import BY_NAME
from halfbyte.formats.errors import UsageError


def run(
    source: Path,
    out: Path,
    options: Options,
    *,
    texts: Sequence[Path] = (),
    heldout: Path | None = None,
    tokenizer: Path | None = None,
    context: int | None = None,
    proof: bool | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """See `converter.qat.train_qat`."""
    converter._check_out(out, source, tokenizer)
    kept = out.with_name(f".{out.name}.qat")
    if resume and not kept.exists():
        raise UsageError(f"nothing to resume: there is no {kept}")
    if not resume and kept.exists():
        raise UsageError(f"{kept} is of a training that was stopped; --resume continues it, or delete it")
    inputs = [p for p in (source, tokenizer, *texts, heldout) if p is not None]
    torch.set_num_threads(options.threads)
    with open_checkpoint(source, tokenizer) as checkpoint:
        models.module_name(checkpoint.config.get("model_type"))
        b = Builder(checkpoint, source_recipe(), context)
        converter.build(b)
        converter._check_context(b, context)
        converter._check_all_used(checkpoint, b)
        store(b, options.recipe)
        json, meta = converter._text(checkpoint, b.vocab)
        template = converter._unicode(checkpoint.chat_template or "", "the chat template")
        parameters = sum(int(np.prod(t.shape)) for t in b.tensors)
        meta |= converter._facts(checkpoint, b, source, options.recipe, parameters)
        weights = Weights(b)
        train, measured = sequences(b, meta, json, template, options, texts, heldout, out.parent)
        teacher = Graph(b, weights)
        student = Graph(
            b, weights, trains=True, integer=options.policy == "i8g32", kv=options.kv or None, rank=options.lora_rank,
            seed=options.seed, start={} if resume else rounded(b, options, json, template, meta, texts, out.parent),
        )  # fmt: skip
        what = identity(options.facts(), files_in(inputs, out), torch.__version__, checkpoint.digest())
        trainer = Trainer(student, teacher, options, train, measured, kept, what)
        if resume:
            trainer.resume()
            if note:
                note(f"continuing at step {trainer.at} of {options.steps}")
        result = trainer.run(progress)
        plan = Plan(b, weights, "rtn", None, json, template, meta)
        plan.method = meta["quantization.method"] = "qat"
        facts = {k: v for k, v in options.facts().items() if k != "recipe"}
        prove = prover(plan, checkpoint, proof, {"training": facts}, heldout=None, unused=False, save=None)
        export(
            b,
            result,
            out,
            meta,
            json,
            template,
            weights,
            prove,
            converter._extras(json, meta, template, note),
        )
    kept.unlink(missing_ok=True)
    return {
        "step": result.step,
        "steps": len(result.curve),
        "nll": result.nll,
        "tokens": sum(len(s) - 1 for s in {id(s): s for s in train}.values()),
        "heldout_tokens": sum(len(s) - 1 for s in measured),
        "measured": result.measured,
        "curve": result.curve,
    }


def rounded(
    b: Builder,
    options: Options,
    tokenizer: bytes,
    template: str,
    meta: dict[str, Any],
    texts: Sequence[Path],
    folder: Path,
) -> dict[int, Planes]:
    """Codes and scales of GPTQ to start from, by tensor; none where training starts from rounding to nearest.

    Raises UsageError where GPTQ is asked for and cannot be.
    """
    matrices = {i: t for i, t in enumerate(b.tensors) if isinstance(t, Matrix) and not t.storage.packed}
    able = tokenizer and all(gptq.supports(t.storage.encoding) for t in matrices.values())
    # at 2 bits training gets further from where the weights are than from GPTQ's codes (benchmarks/LOG.md)
    far = any(BY_NAME[t.storage.encoding].bits <= 2 for t in matrices.values())
    if options.start == "rtn" or (options.start == "auto" and (far or not able)):
        return {}
    if not able:
        raise UsageError("--start gptq needs a tokenizer, and a recipe of q2 to q6")
    weights = Weights(b)
    plan = Plan(b, weights, "gptq", texts[0] if texts else None, tokenizer, template, meta)
    with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
        path = Path(temporary) / "gptq.hb"
        quantize = plan.quantizer(temporary, None)
        assemble(b, path, meta, tokenizer, template, lambda name, count: None, weights, quantize)
        file = File(path)
        return {i: {k: np.array(a) for k, a in file.codes(file.tensors[i]).items()} for i in matrices}


def export(
    b: Builder,
    result: Result,
    out: Path,
    meta: dict[str, Any],
    json: bytes,
    template: str,
    weights: Weights,
    prove: Callable[[Path], bytes] | None = None,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a file with the codes, scales and vectors of a training as they are."""
    for i, values in result.vectors.items():
        b.tensors[i] = Vector(b.tensors[i].name, values)

    def write(sink: Sink) -> set[int]:
        for i, planes in result.planes.items():
            sink(i, 0, planes)
        return set(result.planes)

    assemble(
        b, out, meta, json, template, lambda name, count: None, weights, write, prove=prove, extras=extras
    )
