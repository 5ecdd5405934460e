"""The section VOCB: a tokenizer as tables that a reader uses in place (SPEC.md section 14).

It says nothing that the JSON of section TOKN does not, and is there for readers without a JSON parser, a regular
expression engine or Unicode's tables. `encode` and `decode` are inverse; `decode` checks everything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from .errors import FormatError
from .vocab_tables import (
    MAX_ID,
    MAX_RANK,
    MERGE_BUCKET,
    NONE,
    TOKEN_BUCKET,
    Automaton,
    bad,
    check_character_map,
    check_normal,
    check_trie,
    find_token,
    hash_bytes,
)

VERSION = 1
MODELS = {"bpe": 1, "unigram": 2, "wordpiece": 3}

# Flags of the header.
ADD_BOS, BYTE_LEVEL, BYTE_FALLBACK, FUSE_UNKNOWN, WORD_STARTS = 1, 2, 4, 8, 16

# How the text of the first token differs: not, without so many leading texts, without every such text, or it is the
# token as it is spelled.
FIRST_SAME, FIRST_STRIP, FIRST_WITHOUT, FIRST_SPELLED = range(4)

# Bits of a token's kind.
SPECIAL, CONTROL, WHOLE, PRESENT = 1, 2, 4, 8

# Flags of an added token.
SINGLE_WORD, LEFT, RIGHT, ADDED_SPECIAL = 1, 2, 4, 8

STEPS = {"normal": 1, "map": 2, "replace": 3, "literal": 4, "prepend": 5, "split": 6}
BEHAVIOURS = {"isolated": 0, "removed": 1, "contiguous": 2, "merged_with_previous": 3, "merged_with_next": 4}
INVERT = 8  # beside a behaviour
UNLESS_THERE, FIRST_ONLY = 1, 2  # of prepend

MAX_STEPS = 16
MAX_TEXT = 4096  # bytes of a token, a literal or a replacement

TABLES = (
    "token_offsets", "token_bytes", "kinds", "text_offsets", "text_bytes", "token_hash", "merges", "merged",
    "byte_ids", "scores", "trie", "added", "raw_added", "normalized_added", "steps", "pool", "word_characters",
)  # fmt: skip
_HEAD = struct.Struct("<14Id8I")  # 96 bytes; the last seven are zero
_STEP = struct.Struct("<6I")


@dataclass
class Step:
    """One step of the way from text to words, in order.

    normal    a Normal, as it is encoded                     map      a character map
    replace   matches of the automaton become `text`         literal  occurrences of `pattern` become `text`
    prepend   `text` goes in front; flags UNLESS_THERE (not if the text starts with it), FIRST_ONLY (only at the
              start of all text)
    split     matches of the automaton and what lies between are words, by a behaviour and INVERT in flags
    """

    kind: str
    flags: int = 0
    pattern: bytes = b""
    text: bytes = b""


@dataclass
class Vocab:
    """The tables. `tables` has those of TABLES; `steps` become the tables steps and pool."""

    model: str
    flags: int
    count: int
    unknown: int | None = None
    bos: int | None = None
    normalizers: int = 0
    first: int = FIRST_SAME
    first_count: int = 0
    first_text: bytes = b""
    max_characters: int = 0
    prefix: bytes = b""
    unknown_score: float = 0.0
    steps: list[Step] = field(default_factory=list)
    tables: dict[str, bytes] = field(default_factory=dict)


def encode(v: Vocab) -> bytes:
    """The section: a header of 96 bytes, a directory of (u32 offset, u32 length), then the tables, 64 bytes aligned."""
    pool = bytearray()

    def stored(data: bytes) -> tuple[int, int]:
        pool.extend(bytes(-len(pool) % 4))
        at = len(pool)
        pool.extend(data)
        return at, len(data)

    names = [stored(v.first_text), stored(v.prefix)]
    rows = [_STEP.pack(STEPS[s.kind], s.flags, *stored(s.pattern), *stored(s.text)) for s in v.steps]
    tables = {**v.tables, "steps": b"".join(rows), "pool": bytes(pool)}
    at = _HEAD.size + 8 * len(TABLES)
    directory, body = [], bytearray()
    for name in TABLES:
        data = tables.get(name, b"")
        pad = -(at + len(body)) % 64 if data else 0
        body += bytes(pad)
        directory += [at + len(body) if data else 0, len(data)]
        body += data
    head = _HEAD.pack(
        VERSION, MODELS[v.model], v.flags, v.count,
        NONE if v.unknown is None else v.unknown, NONE if v.bos is None else v.bos,
        v.normalizers, len(v.steps), v.first, v.first_count, *names[0], *names[1],
        v.unknown_score, v.max_characters, *[0] * 7,
    )  # fmt: skip
    return head + struct.pack(f"<{2 * len(TABLES)}I", *directory) + bytes(body)


def decode(data: bytes) -> Vocab:
    """The tables of a section; FormatError, in one line, for anything that section 14 forbids."""
    try:
        v = _decode(data)
        _check_tokens(v)
        _check_model(v)
        _check_added(v)
    except (struct.error, ValueError) as error:
        raise bad(str(error)) from None
    return v


def _decode(data: bytes) -> Vocab:
    if len(data) < _HEAD.size + 8 * len(TABLES):
        raise bad("it is cut off")
    (
        version, model, flags, count, unknown, bos, normalizers, steps, first, first_count,
        first_at, first_length, prefix_at, prefix_length, score, characters, *zeros,
    ) = _HEAD.unpack_from(data)  # fmt: skip
    if version != VERSION:
        raise FormatError(f"the section VOCB has version {version}; a newer halfbyte may know it")
    names = {n: name for name, n in MODELS.items()}
    if model not in names or flags >= 32 or first > FIRST_SPELLED or any(zeros):
        raise bad("the header has an unknown model or flag")
    if not 0 < count <= MAX_ID + 1 or steps > MAX_STEPS or normalizers > steps or first_count > 255:
        raise bad("a number of the header is out of range")
    if any(i != NONE and i >= count for i in (unknown, bos)) or not np.isfinite(score):
        raise bad("the header has an id or score out of range")
    directory = struct.unpack_from(f"<{2 * len(TABLES)}I", data, _HEAD.size)
    tables, end = {}, _HEAD.size + 8 * len(TABLES)
    for name, at, length in zip(TABLES, directory[::2], directory[1::2]):
        if not length and not at:
            tables[name] = b""
            continue
        if not length or at != end + -end % 64 or at + length > len(data) or any(data[end:at]):
            raise bad(f"the table {name} is out of place")
        tables[name] = data[at : at + length]
        end = at + length
    if end != len(data):
        raise bad("bytes follow the last table")
    pool = tables["pool"]

    def taken(at: int, length: int) -> bytes:
        if at + length > len(pool):
            raise bad("a step is outside the pool")
        return pool[at : at + length]

    v = Vocab(
        names[model], flags, count, None if unknown == NONE else unknown, None if bos == NONE else bos,
        normalizers, first, first_count, taken(first_at, first_length), characters,
        taken(prefix_at, prefix_length), score, tables=tables,
    )  # fmt: skip
    if max(first_length, prefix_length) > MAX_TEXT:
        raise bad("a text of the header is too long")
    if len(tables["steps"]) != steps * _STEP.size:
        raise bad("it has another number of steps than it says")
    kinds = {n: name for name, n in STEPS.items()}
    for i in range(steps):
        kind, step_flags, *spans = _STEP.unpack_from(tables["steps"], i * _STEP.size)
        if kind not in kinds:
            raise bad(f"step {i} has the unknown kind {kind}")
        step = Step(kinds[kind], step_flags, taken(*spans[:2]), taken(*spans[2:]))
        _check_step(step, i < normalizers)
        v.steps.append(step)
    if tables["word_characters"]:
        Automaton.decode(tables["word_characters"])
    return v


def _check_step(s: Step, normalizer: bool) -> None:
    limit = {"prepend": UNLESS_THERE | FIRST_ONLY, "split": INVERT | 7}.get(s.kind, 0)
    if s.flags & ~limit or (s.kind == "split" and (s.flags & 7) > max(BEHAVIOURS.values())):
        raise bad(f"a step {s.kind} has unknown flags")
    if len(s.text) > MAX_TEXT or (s.kind in ("prepend", "literal") and len(s.pattern) > MAX_TEXT):
        raise bad(f"the text of a step {s.kind} is too long")
    s.text.decode("utf-8")
    if s.kind == "normal":
        check_normal(s.pattern)
    elif s.kind == "map":
        check_character_map(s.pattern)
    elif s.kind in ("replace", "split"):
        Automaton.decode(s.pattern)
    elif s.kind == "literal" and not s.pattern:
        raise bad("a literal is empty")
    if normalizer and s.kind == "split":
        raise bad("a normaliser splits")


def _texts(v: Vocab, offsets: str, texts: str) -> None:
    o = np.frombuffer(v.tables[offsets], "<u4").astype(np.int64)
    if len(o) != v.count + 1 or o[0] or o[-1] != len(v.tables[texts]) or (np.diff(o) < 0).any():
        raise bad(f"the table {offsets} is out of order")
    if np.diff(o).max() > MAX_TEXT:
        raise bad("a token is too long")


def token(v: Vocab, index: int, table: str = "token") -> bytes:
    """A token's bytes as they are looked up, or with table `text` as they are shown."""
    o = np.frombuffer(v.tables[f"{table}_offsets"], "<u4", 2, 4 * index)
    return v.tables[f"{table}_bytes"][int(o[0]) : int(o[1])]


def find(v: Vocab, text: bytes) -> int | None:
    """The id of a token of the model by its bytes, or None."""
    table = np.frombuffer(v.tables["token_hash"], "<u4")
    found = (i for i in find_token(table, int(hash_bytes([text])[0])) if token(v, i) == text)
    return next(iter(found), None)


def _check_tokens(v: Vocab) -> None:
    _texts(v, "token_offsets", "token_bytes")
    if v.tables["text_offsets"]:
        _texts(v, "text_offsets", "text_bytes")
    kinds = np.frombuffer(v.tables["kinds"], np.uint8)
    if len(kinds) != v.count or (kinds >= 16).any():
        raise bad("the kinds of tokens are out of range")
    slots = np.frombuffer(v.tables["token_hash"], "<u4")
    if len(slots) % TOKEN_BUCKET:
        raise bad("the table of tokens is no whole number of buckets")
    used = slots[slots != NONE]
    if ((used >> np.uint32(12)) >= v.count).any() or (len(slots) and len(used) == len(slots)):
        raise bad("the table of tokens has an id out of range or no free slot")
    byte_ids = np.frombuffer(v.tables["byte_ids"], "<u4")
    if len(byte_ids) not in (0, 256) or ((byte_ids != NONE) & (byte_ids >= v.count)).any():
        raise bad("the tokens of bytes are out of range")


def _check_model(v: Vocab) -> None:
    present = {name for name in ("token_hash", "merges", "merged", "scores", "trie") if v.tables[name]}
    needed = {"bpe": {"token_hash"}, "unigram": {"token_hash", "scores", "trie"}, "wordpiece": {"trie"}}[
        v.model
    ]
    allowed = needed | ({"merges", "merged"} if v.model == "bpe" else set())
    if not needed <= present <= allowed:
        raise bad(f"the tables are not those of a {v.model} model")
    if v.flags & (BYTE_FALLBACK | BYTE_LEVEL) and not v.tables["byte_ids"]:
        raise bad("the tokens of bytes are missing")
    if v.model != "bpe" and v.unknown is None:
        raise bad(f"a {v.model} model has no unknown token")
    merges = np.frombuffer(v.tables["merges"], "<u8")
    merged = np.frombuffer(v.tables["merged"], "<u4")
    used = merges[merges != np.uint64(0xFFFFFFFFFFFFFFFF)]
    if len(merges) % MERGE_BUCKET or (len(merges) and len(used) == len(merges)) or len(merged) > MAX_RANK + 1:
        raise bad("the table of merges is no whole number of buckets or has no free slot")
    ids = np.stack([used >> np.uint64(44), (used >> np.uint64(24)) & np.uint64(0xFFFFF)])
    if (
        (ids >= v.count).any()
        or ((used & np.uint64(0xFFFFFF)) >= len(merged)).any()
        or (merged >= v.count).any()
    ):
        raise bad("a merge is out of range")
    if v.tables["trie"]:
        check_trie(v.tables["trie"], v.count)
    if v.model == "unigram":
        scores = np.frombuffer(v.tables["scores"], "<f8")
        if len(scores) != v.count or not np.isfinite(scores).all():
            raise bad("the scores are not finite or not one a token")


def _check_added(v: Vocab) -> None:
    added = np.frombuffer(v.tables["added"], "<u4")
    if len(added) % 2 or (added[::2] >= v.count).any() or (added[1::2] >= 16).any():
        raise bad("an added token is out of range")
    for name in ("raw_added", "normalized_added"):
        if v.tables[name]:
            check_trie(v.tables[name], len(added) // 2)
    if (added[1::2] & SINGLE_WORD).any() and not v.tables["word_characters"]:
        raise bad("the letters of single words are missing")
