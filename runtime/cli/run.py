"""Generate text: the answer goes to stdout as it is produced, the speed to stderr."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_backend, add_draft, add_file, add_kv, add_policy, number, whole

if TYPE_CHECKING:
    from halfbyte.runtime.generate import Generation
    from halfbyte.runtime.model import Model

HELP = "generate text from a prompt"
MAX_LOOKUP = 64  # speculate.MAX_DRAFT, without importing NumPy for --help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add_file(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; '-' or none: read it from stdin")
    parser.add_argument("--ids", metavar='"1,2,3"', help="token ids as the prompt, instead of text")
    parser.add_argument(
        "-n", "--max-tokens", type=whole(0), default=64, metavar="N", help="tokens at most (default: 64)"
    )
    parser.add_argument(
        "--temp", type=number, default=0.0, metavar="T", help="temperature; 0 (default) is greedy"
    )
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p", type=number, default=1.0, metavar="P", help="draw from this mass of probability"
    )
    parser.add_argument(
        "--min-p", type=number, default=0.0, metavar="P", help="least probability, relative to the likeliest"
    )
    parser.add_argument("--repeat-penalty", type=number, default=1.0, metavar="X")
    parser.add_argument("--presence-penalty", type=number, default=0.0, metavar="X")
    parser.add_argument("--frequency-penalty", type=number, default=0.0, metavar="X")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--lookup",
        type=whole(0, MAX_LOOKUP),
        nargs="?",
        const=10,
        default=0,
        metavar="N",
        help="guess up to N tokens (10) a step from the text so far: the same answer, faster where it copies",
    )
    add_draft(parser)
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="append the answer, with all that `halfbyte replay` needs to give it again",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is: no chat template, special tokens recognised",
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of the file first")
    add_backend(parser)
    add_kv(parser)
    add_policy(parser, "i8g32")


def run(args: argparse.Namespace) -> int:
    """Load, feed, stream."""
    from halfbyte.runtime.model import load

    if args.ids is not None and args.prompt is not None:
        raise UsageError("give either --prompt or --ids, not both")
    ids = None if args.ids is None else parse_ids(args.ids)
    model = load(args.file, args.backend, args.threads, args.kv, args.policy, args.verify)
    if ids is None:
        _ = model.tokenizer  # a model without one is told before anything is read
        prompt = read_prompt() if args.prompt in (None, "-") else args.prompt
        ids = prompt_ids(model, prompt, args.raw)
    draft = None if args.draft is None else load(args.draft, args.backend, args.threads, args.kv, args.policy)
    generation = start(model, ids, args, draft)
    text = stream(generation)
    if args.log:
        from halfbyte.runtime import replay

        replay.append(args.log, replay.describe(generation, text))
    return 0


def start(model: Model, ids: list[int], args: argparse.Namespace, draft: Model | None = None) -> Generation:
    """The generation that the options ask for."""
    from halfbyte.runtime.generate import generate

    return generate(
        model,
        ids,
        max_tokens=args.max_tokens,
        stop=args.stop,
        lookup=args.lookup,
        draft=draft,
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repeat_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
    )


def stream(generation: Generation) -> str:
    """Print pieces as they come, end the line, then say the speed on stderr; the text."""
    text = list[str]()
    try:
        for piece in generation:
            sys.stdout.write(piece)
            sys.stdout.flush()
            text.append(piece)
    except KeyboardInterrupt:
        print(flush=True)  # the message about it starts a line of its own
        raise
    if not text or not text[-1].endswith("\n"):
        print(flush=True)
    full = " (the context is full)" if generation.finish_reason == "context" else ""
    print(f"{generation.speed()}{full}", file=sys.stderr)
    return "".join(text)


def read_prompt() -> str:
    """All of stdin as UTF-8, less one newline at its end. Raises UsageError for anything else."""
    if sys.stdin.isatty():
        print("type the prompt, then Ctrl-D", file=sys.stderr)
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on stdin is not UTF-8 text (byte {error.start})") from None


def parse_ids(text: str) -> list[int]:
    """Token ids separated by commas or spaces. Raises UsageError."""
    parts = [p for p in re.split(r"[,\s]+", text) if p]
    if not parts or not all(re.fullmatch(r"[0-9]{1,10}", p) for p in parts):
        raise UsageError(f"--ids takes numbers such as 1,2,3, not {text[:60]!r}")
    return [int(p) for p in parts]


def prompt_ids(model: Model, prompt: str, raw: bool) -> list[int]:
    """A prompt as token ids: rendered as one user message where the file has a chat template.

    raw continues the text as it is, with special tokens recognised. Otherwise only the template's own
    are: what a user types cannot open or end a turn. Raises UsageError where that cannot be kept.
    """
    tokenizer = model.tokenizer
    if raw or not model.chat_template:
        return tokenizer.encode(prompt, special=raw)
    from halfbyte.runtime import chat

    bos, eos = tokenizer.bos_id, tokenizer.eos_ids[:1]
    tokens: dict[str, Any] = {
        "bos_token": "" if bos is None else tokenizer.piece(bos),
        "eos_token": tokenizer.piece(eos[0]) if eos else "",
    }

    def rendered(content: str) -> str:
        return chat.render(model.chat_template, [{"role": "user", "content": content}], **tokens)

    text = rendered(prompt)
    plain = tokenizer.encode(prompt, bos=False, special=False)
    if tokenizer.encode(prompt, bos=False) == plain:
        return tokenizer.encode(text)
    mark = "halfbyte-prompt"
    before, _, after = rendered(mark).partition(mark)
    for content in (prompt, prompt.strip()):  # many templates trim
        if before + content + after == text:
            middle = tokenizer.encode(content, bos=False, special=False)
            return tokenizer.encode(before) + middle + tokenizer.encode(after, bos=False)
    raise UsageError("the prompt spells a control token inside a chat template; leave it out or use --raw")
