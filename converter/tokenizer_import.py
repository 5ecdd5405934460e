"""Any tokenizer that comes with a checkpoint, as the one form a `.hb` file stores: tokenizer.json.

What a tokenizer puts around a text is reduced to one flag, `add_bos`: the runtime encodes without the
post-processor and adds BOS itself. Whatever else a source would add (an EOS) is named in `notes`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from halfbyte.converter.checkpoints.checkpoint import TokenizerSource
from halfbyte.converter.vocabulary.gguf import read_gguf
from halfbyte.converter.vocabulary.llama2c import read_tokenizer_bin
from halfbyte.converter.vocabulary.pieces import added_token, tokenizer_json
from halfbyte.converter.vocabulary.sentencepiece import read_sentencepiece
from halfbyte.formats.errors import TokenizerError

MAX_BYTES = 256 << 20

# Names by which chat models mark the end of a turn; a generation that meets one is over.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|eot|>",
)
# Classes of transformers that put BOS in front unless told otherwise.
_BOS_BY_DEFAULT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_OTHER_MODALITY = re.compile(r"image|img|audio|video|vision", re.IGNORECASE)


@dataclass(frozen=True)
class ImportedTokenizer:
    """What goes into the file.

    json        a Hugging Face `tokenizers` tokenizer, UTF-8
    bos_id      beginning of sequence, or None
    eos_ids     ids that end a generation, the configured one first
    add_bos     a prompt starts with BOS
    vocab_size  highest id + 1; at most the model's
    notes       what the source would have done and the runtime does not, a sentence each
    """

    json: bytes
    bos_id: int | None
    eos_ids: list[int]
    add_bos: bool
    vocab_size: int
    notes: tuple[str, ...] = ()


def import_tokenizer(source: TokenizerSource, vocab_size: int) -> ImportedTokenizer:
    """Translate a tokenizer for a model with `vocab_size` rows of embedding.

    Raises TokenizerError for one that is damaged, unsupported, or has ids beyond the model's. Fewer ids
    than rows are fine: embeddings are often padded.
    """
    size = len(source.data)
    if size > MAX_BYTES:
        raise TokenizerError(f"the tokenizer has {size} bytes; at most {MAX_BYTES} are read")
    if source.kind == "gguf" and isinstance(source.data, dict):
        read = read_gguf(source.data)
        notes = ("the source appends EOS to a text; halfbyte does not",) if read.add_eos else ()
        return _finish(read.json, source, vocab_size, read.bos, read.eos, read.add_bos, notes)
    if not isinstance(source.data, bytes):
        raise TokenizerError(f"a tokenizer of kind {source.kind!r} must be given as bytes")
    if source.kind == "tokenizer.json":
        return _tokenizer_json(source, source.data, vocab_size)
    if source.kind == "llama2.c":
        vocabulary = read_tokenizer_bin(source.data, vocab_size)
    elif source.kind == "sentencepiece":
        vocabulary = read_sentencepiece(source.data)
    else:
        raise TokenizerError(f"tokenizers of kind {source.kind!r} are not supported")
    ends = [] if vocabulary.eos is None else [vocabulary.eos]
    if source.kind == "llama2.c" and vocabulary.bos is not None:
        ends.append(vocabulary.bos)  # in llama2.c's training data BOS also separates texts
    return _finish(tokenizer_json(vocabulary), source, vocab_size, vocabulary.bos, ends, True, ())


def _tokenizer_json(source: TokenizerSource, data: bytes, vocab_size: int) -> ImportedTokenizer:
    try:
        tokenizer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json is not JSON: {_one_line(error)}") from None
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise TokenizerError("tokenizer.json holds no tokenizer: it has no 'model'")
    if not isinstance(tokenizer.setdefault("added_tokens", []), list):
        raise TokenizerError("tokenizer.json is damaged: 'added_tokens' is not a list")
    # Either would silently shorten or lengthen a prompt.
    tokenizer["truncation"] = tokenizer["padding"] = None
    _match_control_tokens_as_written(tokenizer)
    return _finish(tokenizer, source, vocab_size, None, [], None, ())


def _finish(
    tokenizer: dict[str, Any],
    source: TokenizerSource,
    vocab_size: int,
    bos: int | None,
    ends: list[int],
    add_bos: bool | None,
    notes: tuple[str, ...],
) -> ImportedTokenizer:
    """Apply the configuration beside the tokenizer, check that the library reads it, resolve special ids."""
    config = source.config
    notes += _drop_other_modalities(tokenizer, vocab_size)
    _extend_added(tokenizer, source, vocab_size)
    encoded = _dump(tokenizer)
    loaded = _load(encoded)
    ids: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
    if not ids:
        raise TokenizerError("the tokenizer has no tokens")
    highest = max(ids.values())
    if highest >= vocab_size:
        text = next(text for text, index in ids.items() if index == highest)
        raise TokenizerError(
            f"the tokenizer does not belong to this model: token {text!r} has id {highest}, the model has"
            f" {vocab_size} tokens"
        )
    for token in tokenizer["added_tokens"]:
        if isinstance(token, dict) and ids.get(token.get("content", "")) != token.get("id"):
            raise TokenizerError(f"the tokenizer gives its token {token.get('content')!r} two different ids")

    named = ids.get(_content(config.get("bos_token")))
    bos = named if named is not None else bos
    prefix, suffix = _surroundings(loaded)
    if bos is None and len(prefix) == 1:
        bos = prefix[0]
    if bos is not None and prefix[:1] == [bos]:
        prefix = prefix[1:]
        found = True
    else:
        found = False
    if prefix or suffix:
        around = [loaded.id_to_token(i) for i in prefix + suffix]
        notes += (f"the source puts {' '.join(map(str, around))} around a text; halfbyte does not",)
    configured = config.get("add_bos_token")
    if isinstance(configured, bool):
        add_bos = configured
    elif add_bos is None:
        name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        add_bos = found or name in _BOS_BY_DEFAULT
    if config.get("add_eos_token") is True:
        notes += ("tokenizer_config.json appends EOS to a text; halfbyte does not",)

    named = ids.get(_content(config.get("eos_token")))
    added = [token for token in tokenizer["added_tokens"] if isinstance(token, dict)]
    special = {_content(token) for token in added if token.get("special")}
    turn_ends = [ids[text] for text in _END_OF_TURN if text in special]
    ends = list(dict.fromkeys(([named] if named is not None else []) + ends + turn_ends))
    if not ends and "</s>" in special:
        ends = [ids["</s>"]]
    return ImportedTokenizer(encoded, bos, ends, add_bos and bos is not None, highest + 1, notes)


def _content(token: Any) -> str:
    """The text of a token in tokenizer_config.json, which writes it as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _match_control_tokens_as_written(tokenizer: dict[str, Any]) -> None:
    """Undo a known slip of older Llama tokenizers.

    A `normalized` control token is looked for in normalised text under its normalised name. Where the
    normaliser puts a space in front of a text, "</s>" right after a word is then no longer found.
    """
    normalizer = tokenizer.get("normalizer")
    if not isinstance(normalizer, dict):
        return
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    if any(isinstance(step, dict) and step.get("type") == "Prepend" for step in steps or ()):
        for token in tokenizer["added_tokens"]:
            if isinstance(token, dict) and token.get("special"):
                token["normalized"] = False


def _drop_other_modalities(tokenizer: dict[str, Any], vocab_size: int) -> tuple[str, ...]:
    """Leave out placeholders for images or sound beyond a text model's embedding (Gemma 3 1B has one)."""
    kept, dropped = [], []
    for token in tokenizer["added_tokens"]:
        beyond = isinstance(token, dict) and isinstance(token.get("id"), int) and token["id"] >= vocab_size
        if beyond and _OTHER_MODALITY.search(_content(token)):
            dropped.append(_content(token))
        else:
            kept.append(token)
    tokenizer["added_tokens"] = kept
    return tuple(f"the model has no embedding for {text}; left out" for text in dropped)


def _extend_added(tokenizer: dict[str, Any], source: TokenizerSource, vocab_size: int) -> None:
    """Take over tokens that only added_tokens.json or tokenizer_config.json names."""
    known = {_content(token) for token in tokenizer["added_tokens"]}
    model_vocab = tokenizer["model"].get("vocab")
    in_model = model_vocab if isinstance(model_vocab, dict) else {}
    wanted: dict[str, dict[str, Any]] = {}
    described = source.config.get("added_tokens_decoder")
    for key, token in described.items() if isinstance(described, dict) else ():
        text = _content(token)
        if str(key).isdecimal() and isinstance(token, dict) and text:
            entry = added_token(int(key), text, bool(token.get("special")))
            for name in ("single_word", "lstrip", "rstrip", "normalized"):
                entry[name] = bool(token.get(name))
            wanted[text] = entry
    for text, index in source.added.items():
        if isinstance(text, str) and isinstance(index, int) and text:
            wanted.setdefault(text, added_token(index, text, False))
    missing = [
        entry
        for text, entry in wanted.items()
        if text not in known and not (entry["id"] >= vocab_size and _OTHER_MODALITY.search(text))
    ]
    # A text the model itself knows keeps that id; a contradiction is found once the library has loaded it.
    missing = [entry for entry in missing if in_model.get(entry["content"], entry["id"]) == entry["id"]]
    tokenizer["added_tokens"] += sorted(missing, key=lambda entry: int(entry["id"]))


def _dump(tokenizer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        raise TokenizerError("the tokenizer holds text that is not valid Unicode") from None


def _load(encoded: bytes) -> Any:
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_str(encoded.decode("utf-8"))
        loaded.encode("a \u00e9\n")  # some damage shows only in use
        return loaded
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the Rust library is not an Exception
        raise TokenizerError(f"the tokenizer is damaged or not supported: {_one_line(error)}") from None


def _surroundings(loaded: Any) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text."""
    bare = loaded.encode("a", add_special_tokens=False).ids
    full = loaded.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
