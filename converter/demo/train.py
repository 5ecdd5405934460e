"""Train the demo model: a story model of under two million parameters, on a CPU, within an hour.

Run as a module or a file:
    python -m halfbyte.converter.demo.train --data DIR --out DIR [--minutes N] [--seed 0]

DIR holds the two teachers and text/tinystories.txt (see sample.py). Without --samples the script
first draws the training text from the teachers. The result is a Hugging Face folder in bfloat16.
The learning-rate schedule follows the clock, so a rerun repeats the weights only with --steps.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from halfbyte.converter.demo.sample import TEACHERS, bits_per_character, draw
    from halfbyte.converter.demo.stories import clean, real_stories, split_stories
    from halfbyte.converter.demo.student import (
        BOS,
        EOS,
        SPECIALS,
        Shape,
        Student,
        build_tokenizer,
        continue_text,
        held_out_loss,
    )
except ImportError:  # run as a file, without the package installed
    from sample import TEACHERS, bits_per_character, draw  # type: ignore[no-redef]
    from stories import clean, real_stories, split_stories  # type: ignore[no-redef]
    from student import (  # type: ignore[no-redef]
        BOS,
        EOS,
        SPECIALS,
        Shape,
        Student,
        build_tokenizer,
        continue_text,
        held_out_loss,
    )

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PROMPTS = ("Once upon a time", "One day, a little girl named Mia went to the park.", "Tom had a red ball.")


class Stream:
    """Stories end to end, each <s> ... </s>; windows begin where a story begins."""

    def __init__(self, rows: Sequence[Sequence[int]], seed: int) -> None:
        import numpy as np

        order = np.random.default_rng(seed)
        rows = [rows[i] for i in order.permutation(len(rows))]
        flat = [token for row in rows for token in (*row, EOS)]
        self.tokens = np.array(flat, np.int64)
        starts = np.cumsum([0] + [len(row) + 1 for row in rows[:-1]])
        self.starts = starts[starts < len(flat) - 600]
        self.order = order
        self.queue: list[int] = []

    def batch(self, rows: int, length: int) -> Tensor:
        """int64 [rows, length + 1]; every story is a window's start once before any is again."""
        import numpy as np
        import torch

        while len(self.queue) < rows:
            self.queue = self.order.permutation(self.starts).tolist() + self.queue
        chosen = [self.queue.pop() for _ in range(rows)]
        return torch.from_numpy(np.stack([self.tokens[at : at + length + 1] for at in chosen]))


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warmup over `warmup` steps, then a cosine over `progress` 0..1 to 2 % of the peak."""
    return (
        peak
        * min(1.0, (step + 1) / warmup)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    )


def train(
    student: Student, stream: Stream, watch: Sequence[Sequence[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place until the clock or the step count runs out; the weights end as the best seen.

    `watch` are held-out model samples; their loss picks the checkpoint. Windows are 256 tokens long,
    and the full context for the last fifth, so that late positions are learned too.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    def loss_of(ids: Tensor) -> Tensor:
        return cross_entropy(student.logits(ids[:, :-1], fast=True).flatten(0, 1), ids[:, 1:].flatten())

    if args.compile:
        loss_of = torch.compile(loss_of, dynamic=False)
    matrices = [w for w in student.weights.values() if w.ndim == 2]
    vectors = [w for w in student.weights.values() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.95), fused=True)
    best, best_weights, seen, step = math.inf, {}, 0, 0
    begun = checked = time.monotonic()
    while True:
        now = time.monotonic()
        progress = step / args.steps if args.steps else (now - begun) / (args.minutes * 60)
        if step and (progress >= 1 or now - checked > 120):
            total, count = held_out_loss(student, watch)
            print(
                f"step {step}  held-out samples {total / count:.4f}  {seen} tokens  {now - begun:.0f} s",
                flush=True,
            )
            if total / count < best:
                best = total / count
                best_weights = {k: w.detach().clone() for k, w in student.weights.items()}
                save_file(best_weights, args.work / "best.safetensors")
            checked = time.monotonic()
        if progress >= 1:
            break
        length = student.shape.context if progress > 0.8 else student.shape.context // 2
        ids = stream.batch(args.batch_tokens // length, length)
        optimizer.zero_grad()
        parts = ids.split(max(1, 4096 // length))  # activations that stay near the processor
        losses = []
        for part in parts:
            loss = loss_of(part) * (len(part) / len(ids))
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(student.weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, args.peak)
        optimizer.step()
        seen, step = seen + ids.shape[0] * length, step + 1
        if step % 50 == 0:
            print(f"step {step}  loss {sum(losses):.4f}  progress {progress:.3f}", flush=True)
    student.weights = best_weights
    return {"steps": step, "tokens": seen, "sampled_nll": best, "minutes": round((now - begun) / 60)}


def export(student: Student, tokenizer: Any, out: Path) -> None:
    """Write config.json, model.safetensors (bfloat16, tied head), the tokenizer and its settings."""
    import torch
    from safetensors.torch import save_file

    shape = student.shape
    out.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": BOS, "eos_token_id": EOS}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ends,
    }
    names = {"unk_token": SPECIALS[0], "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS]}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
    }
    generation = {**ends, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_length": shape.context}
    for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    save_file(
        {k: w.detach().to(torch.bfloat16) for k, w in student.weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    # the library makes a file that only its owner reads; an installed copy is for everyone
    (out / "model.safetensors").chmod(0o644)


README = """\
# The demo model

A small story model that ships with halfbyte, so that `halfbyte demo` and the tests have trained weights at
hand. {parameters:,} parameters: a Llama of {layers} layers, width {dim}, ffn {ffn}, {heads} heads and
{kv_heads} kv heads of {head_dim}, tied head, byte-level BPE of {vocab} tokens, context {context}, bfloat16.
Every width is a multiple of 32.

**What it is not.** It writes mostly grammatical English in the manner of a story for small children and
knows nothing else. It loses its plot, mixes up who is who, and holds no facts. It follows no instructions. It is
for showing and testing the runtime, and for nothing else.

## How it was made

`converter/demo/train.py`, from scratch, on a CPU: {tokens:,} training tokens in {steps:,} steps of AdamW
(about {epochs:.1f} passes; {minutes:.0f} minutes, {threads} thread(s)), seed {seed}. The schedule follows the
clock: another run gives a model like this one, not the same weights.

| training text | stories | characters |
|---|---|---|
{texts}

The model samples were drawn at temperature 0.75 (tokens less likely than 3 % of the likeliest removed), about
half of them continuing the first sentence of a real story, and cleaned (`stories.py`: whole stories only, no
loops, no words that fewer than five stories use). The real stories went in {repeat} times.

    python -m halfbyte.converter.demo.sample --data DATA --teacher stories260k --minutes 15 --seed 0 --out FILE
    python -m halfbyte.converter.demo.train --data DATA --out DIR --samples FILE... --minutes {minutes:.0f} --compile

## Measured

Held-out negative log likelihood of the exported weights in float32 arithmetic: every story alone after `<s>`,
`</s>` not scored. The real stories (the last tenth of the sample) served neither training nor the choice of
the checkpoint; the held-out samples chose it.

| text | stories | tokens | nll per token | bits per character |
|---|---|---|---|---|
{measured}

{teachers}
The last tenth of the real sample is harder than its beginning, where the teachers need about 0.86 and 0.88.

## Sample

{samples}

## Sources and licences

* TinyStories (R. Eldan, Y. Li: *TinyStories: How Small Can Language Models Be and Still Speak Coherent
  English?*, arXiv 2305.07759), the real text: CDLA-Sharing-1.0, which asks nothing of the results of
  computing on it. No text of it is in this folder.
* stories260K (A. Karpathy's tinyllamas, trained on TinyStories), a teacher: MIT.
* TinyStories-656K (raincandy-u on Hugging Face, trained on TinyStories), a teacher: its page says Apache-2.0;
  the copy used here came without a licence file.
* The weights and the tokenizer in this folder are ours, under the project's licence.
"""


def teacher_line(data: Path, stories: list[str]) -> str:
    """One sentence: what the teachers need for the same held-out real stories."""
    scores = [
        f"{folder} {bits_per_character(load(data / folder), stories):.4f}"
        for load, folder in TEACHERS.values()
    ]
    return f"The teachers on the same real stories, in bits per character: {', '.join(scores)}."


def quoted(text: str) -> str:
    return "\n".join(f"> {line}" if line else ">" for line in text.splitlines())


def main() -> None:
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the teachers and text/tinystories.txt"
    )
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="files that sample.py wrote")
    parser.add_argument(
        "--sample-minutes", type=float, default=24.0, help="time to draw samples, without --samples"
    )
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps, not by the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--repeat", type=int, default=4, help="how often the real stories go into the stream")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/halfbyte-demo"), help="folder for checkpoints"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="write the folder from the last checkpoint"
    )
    parser.add_argument("--compile", action="store_true", help="faster steps; needs a C++ compiler")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.samples:
        for teacher, share in (("stories260k", 0.75), ("tinystories656k", 0.25)):
            path = args.work / f"{teacher}.txt"
            draw(teacher, args.data, path, minutes=args.sample_minutes * share, seed=args.seed)
            args.samples.append(path)

    real, real_held_out = real_stories(args.data)
    files = {path.stem: split_stories(path.read_text(encoding="utf-8")) for path in args.samples}
    drawn = clean(story for stories in files.values() for story in stories)
    random.Random(args.seed).shuffle(drawn)
    drawn_held_out, drawn = drawn[:200], drawn[200:]
    kinds = {"real stories": real, "model samples": drawn}
    tokenizer_file = args.work / "tokenizer.json"
    if args.export_only:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = build_tokenizer(real * args.repeat + drawn[:20000], Shape.vocab)
        tokenizer.save(str(tokenizer_file), pretty=False)
    rows = {kind: [e.ids for e in tokenizer.encode_batch(stories)] for kind, stories in kinds.items()}
    watch = [e.ids for e in tokenizer.encode_batch(drawn_held_out)]
    checks = {
        "real stories, held out": (real_held_out, [e.ids for e in tokenizer.encode_batch(real_held_out)])
    }
    checks["model samples, held out"] = (drawn_held_out, watch)
    stream = Stream(rows["real stories"] * args.repeat + rows["model samples"], args.seed)
    print(
        {k: (len(v), sum(map(len, v))) for k, v in kinds.items()}, f"{len(stream.tokens)} tokens", flush=True
    )

    student = Student(Shape(), args.seed)
    facts_file = args.work / "facts.json"
    if args.export_only:
        student.weights = load_file(args.work / "best.safetensors")
        facts = json.loads(facts_file.read_text())
    else:
        facts = train(student, stream, watch, args)
        facts_file.write_text(json.dumps(facts))

    student = student.rounded()
    export(student, tokenizer, args.out)
    measured = []
    for name, (stories, ids) in checks.items():
        total, count = held_out_loss(student, ids)
        # a story cut at the context is scored on the characters that remain
        kept = sum(len(tokenizer.decode(row[: Shape.context])) for row in ids)
        bits = total / math.log(2) / kept
        measured.append(f"| {name} | {len(stories)} | {count:,} | {total / count:.4f} | {bits:.4f} |")
    used = set(drawn)
    texts = kinds | {f"of these, {k}": [s for s in dict.fromkeys(v) if s in used] for k, v in files.items()}
    samples = []
    for prompt, temperature in zip(PROMPTS, (0.0, 0.5, 0.5)):
        how = f"temperature {temperature}, seed {args.seed}" if temperature else "greedy"
        text = continue_text(student, tokenizer, prompt, temperature, args.seed)
        samples.append(f"*{prompt}* ({how}):\n\n{quoted(text)}")
    (args.out / "README.md").write_text(
        README.format(
            parameters=sum(w.numel() for w in student.weights.values()),
            head_dim=Shape().head_dim,
            epochs=facts["tokens"] / len(stream.tokens),
            texts="\n".join(f"| {k} | {len(v):,} | {sum(map(len, v)):,} |" for k, v in texts.items()),
            measured="\n".join(measured),
            teachers=teacher_line(args.data, real_held_out),
            samples="\n\n".join(samples),
            **{
                k: getattr(Shape, k)
                for k in ("layers", "dim", "ffn", "heads", "kv_heads", "vocab", "context")
            },
            **{k: getattr(args, k) for k in ("seed", "threads", "repeat")},
            **{k: facts[k] for k in ("tokens", "steps", "minutes")},
        ),
        encoding="utf-8",
    )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print("\n".join(measured), f"\n{size} bytes in {args.out}")


if __name__ == "__main__":
    main()
