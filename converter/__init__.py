"""The converter: a trained checkpoint in, one verified `.hb` file out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.formats.errors import CheckpointError, FormatError, UsageError

if TYPE_CHECKING:
    from halfbyte.converter.allocation.table import Table
    from halfbyte.converter.builder import Builder
    from halfbyte.converter.checkpoints.checkpoint import Checkpoint
    from halfbyte.formats.metadata import Value

__all__ = ["convert"]

# progress(stage or tensor name, weights done, weights in all)
Progress = Callable[[str, int, int], None]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    context: int | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    method: str = "auto",
    smooth: bool = False,
    rotate: bool = False,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    target_bits: float | None = None,
    max_bytes: int | str | None = None,
    max_kld: float | None = None,
    heldout: str | os.PathLike[str] | None = None,
    proof: bool | None = None,
    save_heldout: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    on_plan: Callable[[Table], None] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Convert a checkpoint and return the path of the file written.

    source: a Hugging Face folder, a `.gguf` or a llama2.c `.bin`. recipe: see `converter.recipe`;
    by default codes that arrive quantised are kept and float checkpoints become q4. tokenizer: a file
    to use instead of the one found beside the weights. context: the number of positions to allow,
    at most what the model was made for. calibrate: a text or a `.jsonl` of chats that is like what the model will
    see; method: see `converter.recipe.METHODS`. Without a calibration text gptq uses text that the model writes
    itself (small models) and a built-in mix.

    The file is written aside, in the folder `.OUT.part`, and renamed when complete. A conversion that was stopped, even
    by a kill, goes on where it was when it is called with the same arguments, and gives the same bytes; `note` is
    called with a line that says so. Two conversions to one output at a time are refused. max_memory: bytes that the
    process may take (a number, or a text such as "1.5G"); it changes where things lie, never the result.

    smooth folds SmoothQuant's scales into the program, rotate Hadamard rotations of the residual stream, the heads
    and, as an op, the inputs of the down projections; models that do not allow it are refused.

    Instead of a recipe, one of: plan, a file that names the encoding of every matrix (`allocation.table`);
    target_bits a weight; max_bytes of the file (a number, or a text such as "1.2G"); max_kld, the mean KL from the
    float model in nats a token on the text heldout (default: part of the calibration text, then not calibrated on).
    save_plan: where to write the plan that was used; on_plan is called with it.

    proof: measure how close the file is to the float model and write that into it (section PROF; see `halfbyte
    report`): on the text heldout, else on text that a small model writes itself, else on a built-in one; save_heldout:
    where to write that text. None measures small models only, False writes no proof at all.

    Raises CheckpointError, TokenizerError or UsageError, each in one line.
    """
    from halfbyte.converter import allocate, models
    from halfbyte.converter.allocation import table
    from halfbyte.converter.assemble import Sink, assemble, length
    from halfbyte.converter.builder import Builder
    from halfbyte.converter.calibrate import LENGTH, SEQUENCES
    from halfbyte.converter.checkpoints import open_checkpoint
    from halfbyte.converter.memory import budget
    from halfbyte.converter.plan import OWN_TEXT_WEIGHTS, Plan
    from halfbyte.converter.proof import prover
    from halfbyte.converter.recipe import check_method
    from halfbyte.converter.recipe import recipe as recipe_named
    from halfbyte.converter.unfinished import Unfinished
    from halfbyte.converter.vocabulary import code_points
    from halfbyte.converter.weights import Weights

    out = Path(out)
    _check_out(out, Path(source), None if tokenizer is None else Path(tokenizer))
    if context is not None and not 1 <= context < 1 << 31:
        raise UsageError(f"context must be at least 1, not {context}")
    goal = allocate.Goal(target_bits, allocate.parse_size(max_bytes), max_kld)
    goal.check()
    if (recipe is not None) + (plan is not None) + bool(goal) > 1:
        raise UsageError("choose one: a recipe, a plan, or a goal such as --target-bits")
    if save_plan is not None and not Path(save_plan).parent.is_dir():  # said before anything is measured
        raise UsageError(f"{save_plan}: No such file or directory")
    cap = allocate.parse_size(max_memory)
    if cap is not None and goal:
        raise UsageError(
            "how much memory measuring takes is not known; --max-memory goes with a recipe or a plan"
        )
    asked = [context, method, smooth, rotate, goal.bits, goal.nbytes, goal.kld, proof is not False]
    inputs = [Path(p) for p in (source, tokenizer, calibrate, plan, heldout) if p is not None]
    with (
        open_checkpoint(Path(source), None if tokenizer is None else Path(tokenizer)) as checkpoint,
        Unfinished(out) as unfinished,
    ):
        if recipe is None:
            floats = {"f32", "f16", "bf16", "f64"}
            recipe = "keep" if any(checkpoint.dtype(n) not in floats for n in checkpoint.names()) else "q4"
        recipe_is = "plan" if plan is not None or goal else recipe
        # first of all, since the config of an unsupported type may lack everything else
        models.module_name(checkpoint.config.get("model_type"))
        b = Builder(checkpoint, recipe_named(recipe), context)
        build(b)
        _check_context(b, context)
        _check_all_used(checkpoint, b)
        if rotate:
            _rotate(b)
        json, meta = _text(checkpoint, b.vocab)
        if goal and not json:
            raise UsageError(
                "a goal is measured on text, which takes a tokenizer, and the model has none; see --tokenizer, --plan"
            )
        template = _unicode(checkpoint.chat_template or "", "the chat template")
        extras = _extras(json, meta, template, note)
        total = sum(t.shape[0] * t.shape[1] for t in b.tensors if len(t.shape) == 2)
        parameters = total + sum(t.shape[0] for t in b.tensors if len(t.shape) == 1)
        meta |= _facts(checkpoint, b, Path(source), recipe_is, parameters)
        done = 0

        def report(name: str, weights: int) -> None:
            nonlocal done
            done += weights
            if progress:
                progress(name, done, total)

        method = check_method(method)
        if plan is not None:
            planned, storages = table.read(Path(plan), b)
            method = planned if method == "auto" else method
            table.store(b, storages)
        elif not goal:
            table.lift_head(b, recipe)
        how = Plan(
            b,
            Weights(b),
            method,
            None if calibrate is None else Path(calibrate),
            json,
            template,
            meta,
            smooth,
        )
        tokens = SEQUENCES * min(LENGTH, b.context_limit)
        asks = bool(proof or heldout or save_heldout) or parameters <= OWN_TEXT_WEIGHTS
        if cap is not None:
            code_points.forget()
        room = budget(
            cap, b, how.method, tokens, calibrate is not None, proof is not False, asks and bool(json)
        )
        how.memory = room.activations
        unfinished.begin(_identity(recipe, asked, inputs, out), note)
        folder = unfinished.folder
        how.prepare(folder, progress)
        meta["quantization.method"] = how.method
        prove = prover(
            how, checkpoint, proof, {"smooth": smooth, "rotate": rotate, "context": context},
            heldout=heldout, unused=heldout is not None and max_kld is None,
            save=save_heldout, calibrate=calibrate, progress=progress,
        )  # fmt: skip

        def quantizer() -> Callable[[Sink], set[int]] | None:
            return how.quantizer(folder, progress)

        def trial(path: Path) -> None:
            assemble(b, path, meta, json, template, lambda name, weights: None, how.weights, quantizer())

        held_out = []
        if max_kld is not None:
            held_out = how.hold_out(folder, None if heldout is None else Path(heldout))
        chosen = unfinished.fact("plan")
        if goal and chosen is None:
            used = allocate.choose(
                b, goal, how.method, how.sequences(folder), how.weights, meta, folder,
                held_out=held_out,
                length=lambda: length(b, meta, json, template, prove.room() if prove else 0, extras),
                convert=trial,
                progress=progress,
            )  # fmt: skip
            unfinished.remember("plan", used.facts())
        elif goal:
            used = table.Table.remembered(b, how.method, chosen)
        else:
            used = table.Table.of(b, how.method, {})
        if save_plan is not None:
            used.save(Path(save_plan))
        if on_plan:
            on_plan(used)
        assemble(
            b, out, meta, json, template, report, how.weights, quantizer(),
            unfinished=unfinished, note=note, block=room.block, prove=prove, extras=extras,
        )  # fmt: skip
    return out


def build(b: Builder) -> None:
    """Emit and check the program of a checkpoint. Raises CheckpointError for a config that makes no sense."""
    from halfbyte.converter import models

    try:
        models.build(b)
        _check_program(b)
    except (ArithmeticError, TypeError, ValueError) as error:
        # Model files compute freely with the config's numbers; those of a damaged one may be anything.
        why = " ".join(str(error).split())
        raise CheckpointError(f"config.json makes no sense for this model type: {why}") from error


def _identity(recipe: str, asked: list[Any], inputs: list[Path], out: Path) -> str:
    """What must be as it was for an unfinished file to be continued."""
    import numpy as np

    from halfbyte import __version__
    from halfbyte.converter.unfinished import files_in, identity
    from halfbyte.formats.container import VERSION

    return identity(__version__, VERSION, np.__version__, recipe, asked, files_in(inputs, out))


def _rotate(b: Builder) -> None:
    from halfbyte.converter.fold import Fold
    from halfbyte.converter.quantizers import rotation

    fold = Fold(b)
    rotation.residual(fold)
    rotation.heads(fold)
    rotation.online(fold)


def _check_out(out: Path, source: Path, tokenizer: Path | None) -> None:
    """Refuse an output that is not a file's name, or that would destroy what is read."""
    try:
        if out.is_dir():
            raise UsageError(f"{out} is a folder; give the name of a file, such as {out / 'model.hb'}")
        if not out.parent.is_dir():
            raise UsageError(f"{out.parent} does not exist; create it first")
        if not out.exists():
            return
        if not out.is_file():
            raise UsageError(f"{out} is not a regular file")
        inputs = [source, *(source.iterdir() if source.is_dir() else ())]
        inputs += [] if tokenizer is None else [tokenizer]
        if out.suffix != ".hb" and any(p.exists() and p.samefile(out) for p in inputs):
            raise UsageError(f"{out} is part of the source and would be overwritten; give another name")
        if source.is_file() and source.samefile(out):
            raise UsageError(f"{out} is the source itself; give another name")
    except OSError as error:
        raise UsageError(f"{error.filename or out}: {error.strerror or error}") from None


def _check_context(b: Builder, context: int | None) -> None:
    """Positions beyond what the model was made for would only give nonsense."""
    from halfbyte.converter.rope import parameters

    made_for = b.config.integer("max_position_embeddings", 0, minimum=0)
    scaling = parameters(b.config)
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings", made_for)
    if isinstance(factor, (int, float)) and isinstance(trained, int):
        made_for = max(made_for, int(factor * trained))
    if context is not None and 0 < made_for < context:
        raise UsageError(f"context {context} is more than the {made_for} positions the model was made for")


def _check_program(b: Builder) -> None:
    """What the reader would refuse is found before anything is written."""
    import numpy as np

    from halfbyte.converter.builder import Matrix, Vector
    from halfbyte.formats import program, tiles

    def shape(t: Matrix | Vector) -> program.TensorShape:
        if isinstance(t, Matrix):
            return program.TensorShape(t.name, tiles.P16, t.shape, False)
        is_index = t.values.dtype == np.uint32
        reach = int(t.values.max()) + 1 if is_index else 0
        return program.TensorShape(t.name, tiles.ROWS, t.shape, not is_index, reach)

    tensors = [shape(t) for t in b.tensors]
    try:
        program.verify(*b.finish(), tensors, b.vocab)
    except FormatError as error:
        raise CheckpointError(f"config.json makes no sense: {error}") from None


def _unicode(text: str, what: str) -> str:
    """JSON can spell halves of characters, which no UTF-8 holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{what} is not valid Unicode") from None
    return text


def _text(checkpoint: Checkpoint, vocab: int) -> tuple[bytes, dict[str, Value]]:
    """The tokenizer as JSON (empty when the checkpoint has none) and the metadata that goes with it."""
    generation = checkpoint.generation
    bos, eos, add_bos = (
        generation.get("bos_token_id"),
        list(generation.get("eos_token_id") or []),
        generation.get("add_bos"),
    )
    json = b""
    if checkpoint.tokenizer_source is not None:
        from halfbyte.converter.tokenizer_import import import_tokenizer

        imported = import_tokenizer(checkpoint.tokenizer_source, vocab)
        json = imported.json
        bos = imported.bos_id if bos is None else bos
        eos = list(dict.fromkeys([*eos, *imported.eos_ids]))
        add_bos = imported.add_bos if add_bos is None else add_bos
    for what, ids in (("bos", [] if bos is None else [bos]), ("eos", eos)):
        for i in ids:
            if i >= vocab:
                raise CheckpointError(f"{what} token {i} lies outside the vocabulary of {vocab}")
    meta: dict[str, Value] = {"tokenizer.add_bos": bool(add_bos), "tokenizer.eos_ids": eos}
    if bos is not None:
        meta["tokenizer.bos_id"] = bos
    return json, meta


def _extras(
    json: bytes, meta: dict[str, Value], template: str, note: Callable[[str], None] | None
) -> dict[str, bytes]:
    """Sections for readers without the libraries of Python; what has none is said in a note."""
    from halfbyte.converter.chat.evaluate import compile_chat
    from halfbyte.converter.vocabulary.compile import compile_vocabulary, spelling
    from halfbyte.formats.errors import TokenizerError

    extras: dict[str, bytes] = {}
    texts = "", ""
    if json:
        bos: Any = meta.get("tokenizer.bos_id")
        try:
            extras["VOCB"] = compile_vocabulary(json, bos, bool(meta["tokenizer.add_bos"]))
        except TokenizerError as error:
            if note:
                note(f"no tokenizer for C: the tables cannot hold {error}")
        ends: Any = meta["tokenizer.eos_ids"]
        texts = spelling(json, bos), spelling(json, ends[0] if ends else None)
    if template:
        try:
            extras["CHAT"] = compile_chat(template, *texts)
        except TokenizerError as error:
            if note:
                note(f"no chat for C: the template needs {error}")
    return extras


def _facts(checkpoint: Checkpoint, b: Any, source: Path, recipe: str, parameters: int) -> dict[str, Value]:
    from halfbyte import __version__

    path = source.resolve()
    name = path.name if path.is_dir() else path.stem  # a folder's dots are part of its name
    return {
        "general.name": str(checkpoint.config.get("_name_or_path") or name)
        .encode("utf-8", "replace")
        .decode(),
        "general.model_type": str(checkpoint.config.get("model_type")),
        "general.source_format": checkpoint.format,
        "general.source_digest": checkpoint.digest(),
        "general.tool_version": __version__,
        "general.recipe": recipe,
        "general.parameters": parameters,
        "model.vocab_size": b.vocab,
        "model.context_length": b.context_limit,
        "model.layers": b.layers,
        "model.hidden_size": b.hidden,
    }


def _check_all_used(checkpoint: Checkpoint, b: Any) -> None:
    """A tensor that nothing reads means that the model is not what its config says: refuse to drop it."""
    harmless = ("rotary_emb.inv_freq", "masked_bias", ".attn.bias")
    tied = {"lm_head.weight"} if checkpoint.config.get("tie_word_embeddings") else set()
    unused = [n for n in checkpoint.names() if n not in b.used and n not in tied and not n.endswith(harmless)]
    if unused:
        raise CheckpointError(
            f"tensor {unused[0]} is not part of a {checkpoint.config.get('model_type')} model"
            + (f" (and {len(unused) - 1} more)" if len(unused) > 1 else "")
        )
