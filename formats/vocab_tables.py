"""The tables that the section VOCB is made of (SPEC.md section 14): each is used in place, from the mapped file.

Hash tables hold what is looked up whole (tokens, merges), tries what is looked up by prefix, automata cut text into
words, and character maps replace single characters. Every `check` raises FormatError, in one line.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import FormatError

NONE = 0xFFFFFFFF
MAX_ID = (1 << 20) - 2  # token ids and the tag of a hash share 32 bits, two ids and a rank 64
MAX_RANK = (1 << 24) - 2
MAX_STATES = 1 << 12
MATCH = 0x8000  # in a transition: a match ends before this character
STAYS = 0x100  # beside a combining class: by itself the form leaves the character as it is
ITSELF = b"\xff"  # no byte of UTF-8
PAGES = 0x110000 >> 8  # code points are looked up by page of 256
MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio
TOKEN_BUCKET, MERGE_BUCKET = 16, 8  # slots of a bucket: 64 bytes


def bad(text: str) -> FormatError:
    """The error of a damaged section."""
    return FormatError(f"the section VOCB is damaged: {text}")


# ---- hashes -----------------------------------------------------------------------------------------------


def hash_bytes(texts: Sequence[bytes]) -> np.ndarray:
    """uint64: for h = length; each 8 bytes x (little-endian, zeros behind): h = (h ^ x) * MULTIPLIER; h ^= h >> 32."""
    h = np.array([len(t) for t in texts], np.uint64)
    words = (h + np.uint64(7)) >> np.uint64(3)
    for i in range(int(words.max(initial=0))):
        rows = np.flatnonzero(words > i)
        chunk = b"".join(texts[r][8 * i : 8 * i + 8].ljust(8, b"\0") for r in rows.tolist())
        x = (h[rows] ^ np.frombuffer(chunk, "<u8")) * np.uint64(MULTIPLIER)
        h[rows] = x ^ (x >> np.uint64(32))
    return h


def hash_pairs(keys: np.ndarray) -> np.ndarray:
    """uint64 of left << 20 | right: the key times MULTIPLIER."""
    return keys.astype(np.uint64) * np.uint64(MULTIPLIER)


def buckets(h: np.ndarray, count: int) -> np.ndarray:
    """The first bucket of each hash: its upper half, scaled to the number of buckets."""
    return ((h >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)


def hash_table(h: np.ndarray, entries: np.ndarray, bucket: int) -> np.ndarray:
    """Entries in the first bucket with room, from their own on; empty slots are all ones.

    A search ends at the first empty slot, so that a table always has one.
    """
    count = max(1, -(-len(entries) * 3 // (2 * bucket)))
    if len(entries) >= count * bucket:
        count += 1
    empty = np.iinfo(entries.dtype).max
    table = np.full(count * bucket, empty, entries.dtype)
    used = [0] * count
    for entry, at in zip(entries.tolist(), buckets(h, count).tolist()):
        while used[at] == bucket:
            at = (at + 1) % count
        table[at * bucket + used[at]] = entry
        used[at] += 1
    return table


def token_table(texts: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """u32 id << 12 | the lowest 12 bits of the hash, for each token."""
    h = hash_bytes(texts)
    entries = (np.asarray(ids, np.uint32) << np.uint32(12)) | (h & np.uint64(0xFFF)).astype(np.uint32)
    return hash_table(h, entries, TOKEN_BUCKET).astype("<u4").tobytes()


def merge_table(pairs: np.ndarray) -> bytes:
    """u64 left << 44 | right << 24 | rank, for each row (left, right) of `pairs`."""
    keys = (pairs[:, 0].astype(np.uint64) << np.uint64(20)) | pairs[:, 1].astype(np.uint64)
    entries = (keys << np.uint64(24)) | np.arange(len(pairs), dtype=np.uint64)
    return hash_table(hash_pairs(keys), entries, MERGE_BUCKET).astype("<u8").tobytes()


def find_token(table: np.ndarray, h: int) -> Iterable[int]:
    """Ids in a token table whose tag is that of the hash."""
    count = len(table) // TOKEN_BUCKET
    at = int(buckets(np.array([h], np.uint64), count)[0]) * TOKEN_BUCKET
    for step in range(len(table)):
        entry = int(table[(at + step) % len(table)])
        if entry == NONE:
            return
        if entry & 0xFFF == h & 0xFFF:
            yield entry >> 12


# ---- tries ------------------------------------------------------------------------------------------------


def trie(texts: Mapping[bytes, int]) -> bytes:
    """u32 nodes, u32 child[nodes + 1], u32 value[nodes], u8 label[nodes].

    Nodes are numbered breadth first from the root, 0; children of n are child[n] .. child[n + 1] - 1, their labels
    ascend. value is NONE where no text ends.
    """
    items = sorted(texts.items())
    keys = [k for k, _ in items]
    value = [items[0][1] if items and not items[0][0] else NONE]
    child, label = [], bytearray(1)
    level = [(1 if items and not items[0][0] else 0, len(items))]
    depth = 0
    while level:
        below = []
        for lo, hi in level:
            child.append(len(label))
            while lo < hi:
                c, end = keys[lo][depth], lo + 1
                while end < hi and keys[end][depth] == c:
                    end += 1
                label.append(c)
                ends = len(keys[lo]) == depth + 1
                value.append(items[lo][1] if ends else NONE)
                below.append((lo + ends, end))
                lo = end
        level, depth = below, depth + 1
    child.append(len(label))
    head = np.array([len(label), *child, *value], "<u4")
    return head.tobytes() + bytes(label)


def check_trie(data: bytes, values: int) -> None:
    """Children come after their parent, values are below `values`."""
    if len(data) < 4:
        raise bad("a trie is cut off")
    (nodes,) = struct.unpack_from("<I", data)
    if not nodes or len(data) != 4 + 4 * (nodes + 1) + 5 * nodes:
        raise bad("a trie has another size than it says")
    child = np.frombuffer(data, "<u4", nodes + 1, 4).astype(np.int64)
    value = np.frombuffer(data, "<u4", nodes, 8 + 4 * nodes)
    if child[0] != 1 or child[-1] != nodes or (np.diff(child) < 0).any():
        raise bad("the nodes of a trie are out of order")
    if (child[:-1] <= np.arange(nodes)).any():
        raise bad("a trie has a node before its parent")
    if ((value != NONE) & (value >= values)).any():
        raise bad("a trie has a value out of range")


# ---- code points ------------------------------------------------------------------------------------------


def pages(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16 page of each 256 code points, and the distinct pages: a two-stage table of one number a code point."""
    rows = values.reshape(PAGES, 256)
    first: dict[bytes, int] = {}
    index = [first.setdefault(row.tobytes(), len(first)) for row in rows]
    distinct = np.frombuffer(b"".join(first), values.dtype).reshape(-1, 256)
    return np.array(index, "<u2"), distinct


def _page_index(data: bytes, at: int, count: int) -> np.ndarray:
    index = np.frombuffer(data, "<u2", PAGES, at)
    if (index >= count).any():
        raise bad("a page of code points does not exist")
    return index


@dataclass
class Automaton:
    """A deterministic automaton that finds the leftmost match of a pattern, preferring as the pattern does.

    classes      uint8[0x110000]: class of each code point; the class after the last is the end of the text
    transitions  uint16[states, classes + 1]: next state, with MATCH set where a match ends before the character.
                 State 0 is dead
    start        state at the start of the text, and elsewhere
    """

    classes: np.ndarray
    transitions: np.ndarray
    start: tuple[int, int]

    def encode(self) -> bytes:
        """u32 states, columns, start at 0, start elsewhere, pages; u16 page[4352]; u8 classes; u16 transitions."""
        index, distinct = pages(self.classes)
        states, columns = self.transitions.shape
        head = struct.pack("<5I", states, columns, *self.start, len(distinct))
        body = distinct.astype(np.uint8).tobytes() + self.transitions.astype("<u2").tobytes()
        return head + index.tobytes() + body

    @staticmethod
    def decode(data: bytes) -> Automaton:
        """Checked; FormatError for anything that could lead outside the tables."""
        if len(data) < 20:
            raise bad("an automaton is cut off")
        states, columns, start, elsewhere, count = struct.unpack_from("<5I", data)
        if not (0 < states <= MAX_STATES and 1 < columns <= 256 and 0 < count <= PAGES):
            raise bad("an automaton has a size out of range")
        if len(data) != 20 + 2 * PAGES + 256 * count + 2 * states * columns:
            raise bad("an automaton has another size than it says")
        index = _page_index(data, 20, count)
        distinct = np.frombuffer(data, np.uint8, 256 * count, 20 + 2 * PAGES).reshape(count, 256)
        t = np.frombuffer(data, "<u2", states * columns, 20 + 2 * PAGES + 256 * count)
        if start >= states or elsewhere >= states or ((t & (MATCH - 1)) >= states).any():
            raise bad("an automaton has a state out of range")
        if (distinct >= columns - 1).any() or (t[:columns] != 0).any():
            raise bad("an automaton has a class out of range or leaves the dead state")
        return Automaton(distinct[index].reshape(-1), t.reshape(states, columns), (start, elsewhere))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the matches in a text, one after the other: what the library's find_iter gives."""
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        columns = [*self.classes[points].tolist(), self.transitions.shape[1] - 1]
        table = self.transitions.tolist()
        found, at = [], 0
        while at < len(text):
            state, end = self.start[bool(at)], 0
            for i in range(at, len(columns)):
                to = table[state][columns[i]]
                if to & MATCH and i > at:
                    end = i
                state = to & (MATCH - 1)
                if not state:
                    break
            if end:
                found.append((at, end))
            at = end or at + 1
        return found


def character_map(replaced: Mapping[int, bytes]) -> bytes:
    """u32 entries, pages; u16 page[4352]; u16 entry + 1 or 0 (unchanged) by code point; u32 offsets; bytes.

    The byte ITSELF in a text stands for the character.
    """
    texts = sorted(set(replaced.values()))
    numbers = {t: i + 1 for i, t in enumerate(texts)}
    values = np.zeros(0x110000, np.uint16)
    for point, text in replaced.items():
        values[point] = numbers[text]
    index, distinct = pages(values)
    offsets = np.cumsum([0] + [len(t) for t in texts]).astype("<u4")
    head = struct.pack("<2I", len(texts), len(distinct)) + index.tobytes() + distinct.astype("<u2").tobytes()
    return head + offsets.tobytes() + b"".join(texts)


def check_character_map(data: bytes) -> None:
    """Every code point has an entry that is there."""
    if len(data) < 8:
        raise bad("a character map is cut off")
    entries, count = struct.unpack_from("<2I", data)
    at = 8 + 2 * PAGES + 512 * count
    if not 0 < count <= PAGES or entries > 0xFFFE or len(data) < at + 4 * (entries + 1):
        raise bad("a character map is cut off")
    _page_index(data, 8, count)
    if (np.frombuffer(data, "<u2", 256 * count, 8 + 2 * PAGES) > entries).any():
        raise bad("a character map names an entry that does not exist")
    offsets = np.frombuffer(data, "<u4", entries + 1, at).astype(np.int64)
    if offsets[0] or (np.diff(offsets) < 0).any() or at + 4 * (entries + 1) + offsets[-1] != len(data):
        raise bad("the texts of a character map are out of order")


@dataclass
class Normal:
    """A Unicode normal form: what becomes of the code points that it may change or reorder.

    points   code point -> (combining class | STAYS, full decomposition; () if it has none or is Hangul)
    pairs    (first, second) -> composite; empty for a form that only decomposes
    """

    compose: bool
    points: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)

    def encode(self) -> bytes:
        """u32 compose, records, characters, pairs, pages; u16 page[4352]; u16 record + 1 or 0 (safe) by code point;

        records of u32 class, u32 first, u32 count; u32 characters; sorted pairs of u32 first, second, composite.
        """
        distinct = sorted(set(self.points.values()))
        numbers = {p: i + 1 for i, p in enumerate(distinct)}
        values = np.zeros(0x110000, np.uint16)
        for point, record in self.points.items():
            values[point] = numbers[record]
        index, table = pages(values)
        records: list[int] = []
        characters: list[int] = []
        for ccc, text in distinct:
            records += [ccc, len(characters), len(text)]
            characters += text
        triples = [x for (a, b), c in sorted(self.pairs.items()) for x in (a, b, c)]
        head = struct.pack("<5I", self.compose, len(distinct), len(characters), len(self.pairs), len(table))
        tail = np.array([*records, *characters, *triples], "<u4").tobytes()
        return head + index.tobytes() + table.astype("<u2").tobytes() + tail


def check_normal(data: bytes) -> None:
    """Records, characters and pairs are there, in order, and Unicode."""
    if len(data) < 20:
        raise bad("a normal form is cut off")
    compose, records, characters, pairs, count = struct.unpack_from("<5I", data)
    at = 20 + 2 * PAGES + 512 * count
    if compose > 1 or not 0 < count <= PAGES or max(records, characters, pairs) > 1 << 20:
        raise bad("a normal form has a size out of range")
    if len(data) != at + 4 * (3 * records + characters + 3 * pairs):
        raise bad("a normal form has another size than it says")
    _page_index(data, 20, count)
    if (np.frombuffer(data, "<u2", 256 * count, 20 + 2 * PAGES) > records).any():
        raise bad("a normal form names a record that does not exist")
    numbers = np.frombuffer(data, "<u4", 3 * records + characters + 3 * pairs, at).astype(np.int64)
    r = numbers[: 3 * records].reshape(-1, 3)
    if (r[:, 0] > 511).any() or (r[:, 2] > 32).any() or (r[:, 1] + r[:, 2] > characters).any():
        raise bad("a decomposition is out of range")
    points = numbers[3 * records :]
    if (points >= 0x110000).any() or ((points >= 0xD800) & (points < 0xE000)).any():
        raise bad("a normal form has a character that is not Unicode")
    p = points[characters:].reshape(-1, 3)
    if pairs > 1 and (np.diff((p[:, 0] << 21) | p[:, 1]) <= 0).any():
        raise bad("the pairs of a normal form are not in order")
