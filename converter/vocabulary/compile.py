"""A tokenizer.json as the section VOCB: everything that a reader in C needs, computed here, once.

What a library of that name would do and the tables cannot say is refused by name: then the file has no such section.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from halfbyte.converter.vocabulary.code_points import word_characters
from halfbyte.converter.vocabulary.patterns import Characters, automaton
from halfbyte.converter.vocabulary.steps import normalizer_steps, pre_tokenizer_steps
from halfbyte.formats import vocab
from halfbyte.formats.byte_decoder import ByteDecoder, byte_alphabet
from halfbyte.formats.errors import TokenizerError
from halfbyte.formats.vocab import Vocab
from halfbyte.formats.vocab_tables import MAX_ID, MAX_RANK, NONE, merge_table, token_table, trie

_SPACE = "\u2581"
_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_MODELS = {"BPE": "bpe", "Unigram": "unigram", "WordPiece": "wordpiece"}


def spelling(encoded: bytes, index: int | None) -> str:
    """How a tokenizer spells a token; '' for None."""
    import tokenizers

    if index is None:
        return ""
    library = tokenizers.Tokenizer.from_str(encoded.decode("utf-8"))
    added = library.get_added_tokens_decoder()
    return added[index].content if index in added else library.id_to_token(index) or ""


def compile_vocabulary(encoded: bytes, bos_id: int | None, add_bos: bool) -> bytes:
    """The section VOCB of a tokenizer that `import_tokenizer` made.

    Raises TokenizerError, which names what the section cannot hold.
    """
    import tokenizers

    described = json.loads(encoded)
    library = tokenizers.Tokenizer.from_str(encoded.decode("utf-8"))
    return vocab.encode(_Compiler(described, library, bos_id, add_bos).compiled())


class _Compiler:
    def __init__(self, described: dict[str, Any], library: Any, bos_id: int | None, add_bos: bool) -> None:
        self.described, self.library, self.model = described, library, described["model"]
        if self.model["type"] not in _MODELS:
            raise TokenizerError(f"the model {self.model['type']}")
        ids = library.get_vocab(with_added_tokens=True)
        self.added = library.get_added_tokens_decoder()
        self.pieces = {i: t for t, i in ids.items()} | {i: t.content for i, t in self.added.items()}
        self.count = max(self.pieces) + 1
        if self.count > MAX_ID:
            raise TokenizerError(f"{self.count} token ids (at most {MAX_ID})")
        self.known: dict[str, int] = self._known()
        self.alphabet = byte_alphabet()
        normalizers = normalizer_steps(described.get("normalizer"))
        steps, self.byte_level = pre_tokenizer_steps(described.get("pre_tokenizer"))
        if len(normalizers) + len(steps) > vocab.MAX_STEPS:
            raise TokenizerError("so many steps of normalisation")
        if self.byte_level and self.model["type"] != "BPE":
            raise TokenizerError(f"bytes in a {self.model['type']} model")
        unknown = self._unknown()
        flags = (vocab.ADD_BOS if add_bos and bos_id is not None else 0) | (
            vocab.BYTE_LEVEL if self.byte_level else 0
        )
        self.v = Vocab(
            _MODELS[self.model["type"]], flags, self.count, unknown, bos_id, len(normalizers),
            steps=[*normalizers, *steps],
        )  # fmt: skip
        self.kinds = np.zeros(self.count, np.uint8)
        self.kinds[list(self.pieces)] |= vocab.PRESENT

    def _known(self) -> dict[str, int]:
        """Tokens of the model; of equal ones the last counts."""
        entries = self.model["vocab"]
        return dict(entries) if isinstance(entries, dict) else {t: i for i, (t, _) in enumerate(entries)}

    def _unknown(self) -> int | None:
        if self.model["type"] == "Unigram":
            if self.model.get("unk_id") is None:
                raise TokenizerError("a unigram model without an unknown token")
            return int(self.model["unk_id"])
        name = self.model.get("unk_token")
        if name is not None and name not in self.known:
            raise TokenizerError(f"the unknown token {name!r}, which is no token")
        return None if name is None else self.known[name]

    def compiled(self) -> Vocab:
        v, model = self.v, self.model
        self._added()
        if v.model == "bpe":
            self._bpe()
        elif v.model == "unigram":
            self._unigram()
        else:
            v.max_characters = model["max_input_chars_per_word"]
            v.prefix = model["continuing_subword_prefix"].encode()
            v.tables["trie"] = trie({t.encode(): i for t, i in self.known.items() if t})
        self._texts()
        v.tables["kinds"] = self.kinds.tobytes()
        return v

    # ---- added tokens ----

    def _added(self) -> None:
        strange = {t.id for t in self.library.model.tokenize("\U0010ffff")}
        normalize = self.library.normalizer.normalize_str if self.library.normalizer else str
        rows: list[int] = []
        tries: tuple[dict[bytes, int], dict[bytes, int]] = {}, {}
        for special in (True, False):  # of equal texts the first counts
            for index, t in self.added.items():
                if t.special is not special:
                    continue
                if special:
                    self.kinds[index] |= vocab.SPECIAL | (0 if index in strange else vocab.CONTROL)
                text = normalize(t.content) if t.normalized else t.content
                if not text:
                    raise TokenizerError(f"the added token {t.content!r}, which is empty")
                tries[t.normalized].setdefault(text.encode(), len(rows) // 2)
                rows += [index, t.single_word * vocab.SINGLE_WORD | t.lstrip * vocab.LEFT
                         | t.rstrip * vocab.RIGHT | special * vocab.ADDED_SPECIAL]  # fmt: skip
        tables = self.v.tables
        tables["added"] = np.array(rows, "<u4").tobytes()
        for name, texts in zip(("raw_added", "normalized_added"), tries):
            if texts:
                tables[name] = trie(texts)
        if any(t.single_word for t in self.added.values()):
            tables["word_characters"] = automaton(Characters("w"), {"w": word_characters()}).encode()

    # ---- models ----

    def _matched(self, piece: str) -> bytes | None:
        """The bytes that the model knows a token by; None where no word can be spelled so."""
        if not self.byte_level:
            return piece.encode()
        if not piece or any(c not in self.alphabet for c in piece):
            return None
        return bytes([self.alphabet[c] for c in piece])

    def _bpe(self) -> None:
        m, v = self.model, self.v
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if m.get(name):
                raise TokenizerError(f"the option {name}")
        pairs = self._merges()
        ignore = m.get("ignore_merges", False)
        self.v.flags |= vocab.FUSE_UNKNOWN if m.get("fuse_unk") else 0
        if self.byte_level:
            ids = [self.known.get(c, NONE) for c in sorted(self.alphabet, key=self.alphabet.__getitem__)]
            if m.get("byte_fallback") and NONE in ids:
                raise TokenizerError("byte fallback beside an alphabet of bytes")
            v.tables["byte_ids"] = np.array(ids, "<u4").tobytes()
        elif m.get("byte_fallback"):
            self._byte_fallback()
        if not self.byte_level and _SPACE in self.known:
            joined = self.known if ignore else {self.pieces[i] for i in self.merged}
            if not self._starts_inside(joined):
                v.flags |= vocab.WORD_STARTS
                v.prefix = _SPACE.encode()
        texts, numbers = [], []
        for piece, index in self.known.items():
            text = self._matched(piece)
            if text and len(text) <= vocab.MAX_TEXT:
                texts.append(text)
                numbers.append(index)
        chosen = numbers if ignore else [i for i, ids in zip(numbers, self._modelled(numbers)) if ids == [i]]
        self.kinds[chosen] |= vocab.WHOLE
        v.tables["token_hash"] = token_table(texts, numbers)
        if len(pairs):
            v.tables["merges"] = merge_table(pairs)
            v.tables["merged"] = np.array(self.merged, "<u4").tobytes()

    def _modelled(self, numbers: list[int]) -> list[list[int]]:
        """What the model alone makes of the spelling of each token."""
        from tokenizers import Tokenizer

        alone = Tokenizer(self.library.model)
        return [
            e.ids for e in alone.encode_batch([self.pieces[i] for i in numbers], add_special_tokens=False)
        ]

    @staticmethod
    def _starts_inside(texts: Any) -> bool:
        """Whether a mark of a word's start follows anything but another in some token."""
        return any(_SPACE in t.lstrip(_SPACE) for t in texts)

    def _merges(self) -> np.ndarray:
        ranks: dict[tuple[int, int], int] = {}
        results = []
        for rank, merge in enumerate(self.model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks[self.known[left], self.known[right]] = rank  # of equal pairs the last counts
            results.append(self.known[left + right])
        order = sorted(ranks.items(), key=lambda item: item[1])
        if len(order) > MAX_RANK:
            raise TokenizerError(f"{len(order)} merges (at most {MAX_RANK})")
        self.merged = [results[rank] for _, rank in order]
        return np.array([pair for pair, _ in order], np.uint32).reshape(-1, 2)

    def _byte_fallback(self) -> None:
        found = [name for name in _BYTES if name in self.known]
        if not found:  # then no character ever has its bytes
            return
        if len(found) < len(_BYTES):
            raise TokenizerError("byte fallback without all 256 tokens of bytes")
        self.v.flags |= vocab.BYTE_FALLBACK
        self.v.tables["byte_ids"] = np.array([self.known[name] for name in _BYTES], "<u4").tobytes()

    def _unigram(self) -> None:
        v = self.v
        if self.model.get("byte_fallback"):
            self._byte_fallback()
        scores = np.zeros(self.count)
        listed = [score for _, score in self.model["vocab"]]
        scores[: len(listed)] = listed
        v.unknown_score = min(listed) - 10.0  # Unigram's penalty for what is unknown
        v.tables["scores"] = scores.astype("<f8").tobytes()
        texts = {t.encode(): i for t, i in self.known.items() if t}
        v.tables["trie"] = trie(texts)
        v.tables["token_hash"] = token_table(list(texts), list(texts.values()))

    # ---- what tokens say ----

    def _texts(self) -> None:
        rules = _Decoder(self.described.get("decoder"), self.library)
        spelled, shown = [], []
        for index in range(self.count):
            piece = self.pieces.get(index, "")
            text = rules.shown(piece)
            own = self._matched(piece)
            if self.byte_level and own is None:
                own = text
            spelled.append(piece.encode() if own is None else own)
            shown.append(text)
        v = self.v
        v.first, v.first_count, v.first_text = rules.first
        for name, texts in (("token", spelled), ("text", shown if shown != spelled else None)):
            if texts is not None:
                if max(map(len, texts)) > vocab.MAX_TEXT:
                    raise TokenizerError(f"a token of {max(map(len, texts))} bytes")
                lengths = np.cumsum([0] + [len(t) for t in texts])
                v.tables[f"{name}_offsets"] = lengths.astype("<u4").tobytes()
                v.tables[f"{name}_bytes"] = b"".join(texts)


class _Decoder:
    """What each token adds to a text, and how that differs for the first: (rule, count, text)."""

    def __init__(self, entry: dict[str, Any] | None, library: Any) -> None:
        if entry is None:
            raise TokenizerError("a tokenizer without decoder")
        self.rules: ByteDecoder | None = None
        self.first: tuple[int, int, bytes] = (vocab.FIRST_SAME, 0, b"")
        steps = entry["decoders"] if entry["type"] == "Sequence" else [entry]
        if [step["type"] for step in steps] == ["WordPiece"]:
            self.chain = library.decoder.decode
            self.first = (vocab.FIRST_SPELLED, 0, b"")
            return
        self.rules = rules = ByteDecoder.of(entry)
        if rules.metaspace is not None:
            self.first = (vocab.FIRST_WITHOUT, 0, rules.metaspace.encode())
        elif rules.strip:
            self.first = (vocab.FIRST_STRIP, rules.strip, rules.strip_text)

    def shown(self, piece: str) -> bytes:
        if self.rules is not None:
            return self.rules.bytes_of(piece)
        if piece and self.chain([piece]) != piece:
            raise TokenizerError(f"the decoder, which changes a text's first token {piece!r}")
        return self.chain(["x", piece])[1:].encode() if piece else b""
