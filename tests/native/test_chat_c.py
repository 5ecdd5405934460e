"""Chat in C (native/src/chat.c) against the Python rendering, for every template of the storable shape."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ctokenizer import CError, CTokenizer
from test_tokenizer_vectors import folder

from halfbyte.converter.chat.evaluate import compile_chat
from halfbyte.converter.tokenizer_import import import_tokenizer
from halfbyte.converter.vocabulary.compile import compile_vocabulary
from halfbyte.formats import chat
from halfbyte.formats.errors import FormatError, TokenizerError, UsageError
from halfbyte.runtime.backends import native
from halfbyte.runtime.chat import render
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    native.library_path() is None, reason="the native library is not built (make native)"
)
BOS, EOS = "<s>", "</s>"
STORED, WITH_SYSTEM = 43, 39  # of the 65 templates in ../shared/data; more is better, fewer is a regression

WORDS = (
    "Why?",
    " \n Because.\n\n",
    "\u4f60\u597d\u3000",
    "",
    "a\n\nb",
    "<think>\nhm\n</think>\n\nSo.",
    "{{ x }}",
)
CONVERSATIONS = [
    [*([("system", system)] if system is not None else []),
     *((("user", "assistant")[i % 2], WORDS[(i + shift) % len(WORDS)]) for i in range(length))]
    for length in (1, 3, 5)
    for shift, system in enumerate((None, "Be brief.", " \n padded\n ", None, "\u00e9\u0301", "\n", "x"))
]  # fmt: skip


def messages(ffi: Any, conversation: list[tuple[str, str]]) -> tuple[Any, list[Any]]:
    """hb_message[] and what it points to."""
    table = ffi.new("hb_message[]", max(1, len(conversation)))
    keep = []
    for row, (role, content) in zip(table, conversation):
        data = content.encode()
        keep += [ffi.new("char[]", role.encode()), ffi.new("char[]", data)]
        row.size, row.role, row.content, row.bytes = ffi.sizeof("hb_message"), *keep[-2:], len(data)
    return table, keep


def rendered(section: bytes, conversation: list[tuple[str, str]]) -> str:
    """hb_chat_render, with the room that it asks for."""
    ffi, lib = native.load_library()
    table, keep = messages(ffi, conversation)
    room = 0
    for _ in range(2):
        text = ffi.new("char[]", room + 1)
        n = lib.hb_chat_render(section, len(section), table, len(conversation), text, room)
        if n < 0:
            raise CError(n, ffi.string(lib.hb_last_error()).decode())
        room = n
    assert keep
    return bytes(ffi.buffer(text, n)[:]).decode()


@cache
def sections(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Sections of the templates that have one, and why the others have none."""
    found, refused = {}, {}
    for path in sorted(folder.glob("*.jinja")):
        try:
            found[path.name] = compile_chat(path.read_text("utf-8"), BOS, EOS)
        except TokenizerError as error:
            refused[path.name] = str(error)
    return found, refused


def test_every_template_of_the_shape_is_as_python_renders_it(shared_data: Path) -> None:
    templates = shared_data / "chat-templates"
    found, refused = sections(templates)
    with_system = prompts = 0
    for name, section in found.items():
        template, law = (templates / name).read_text("utf-8"), chat.decode(section)
        assert chat.encode(law) == section
        takes = bool(law.flags & chat.FOLD) or (chat.START, chat.SYSTEM) in law.joints
        with_system += takes
        for conversation in CONVERSATIONS:
            if conversation[0][0] == "system" and not takes:
                with pytest.raises(CError, match="has no system after its start"):
                    rendered(section, conversation)
                continue
            listed = [{"role": role, "content": content} for role, content in conversation]
            try:
                want = render(template, listed, bos_token=BOS, eos_token=EOS)
            except UsageError:  # an empty message, say, that the template refuses and C does not
                continue
            assert rendered(section, conversation) == law.render(conversation), name
            if all(content for _, content in conversation):
                assert rendered(section, conversation) == want, (name, conversation)
                prompts += 1
    print(
        f"\n{len(found)} of {len(found) + len(refused)} templates are stored, {with_system} take a system message;"
        f" {prompts} prompts compared"
    )
    assert len(found) >= STORED and with_system >= WITH_SYSTEM
    assert all("\n" not in why for why in refused.values())
    assert "date" in refused["openai-gpt-oss-120b.jinja"]


def test_conversations_that_the_shape_does_not_have(shared_data: Path) -> None:
    section = sections(shared_data / "chat-templates")[0]["Qwen-Qwen3-0.6B.jinja"]
    for conversation, why in (
        ([("assistant", "a")], "no assistant after its start"),
        ([("user", "a"), ("user", "b")], "no user after user"),
        ([("tool", "a")], "role tool"),
        ([], "no end after its start"),
        ([("user", "a"), ("assistant", "b")], "no end after assistant"),
    ):
        with pytest.raises(CError, match=why):
            rendered(section, conversation)
    with pytest.raises(CError, match="no section CHAT"):
        rendered(b"", [("user", "a")])
    for n in range(0, len(section), 7):
        if n < 152:
            with pytest.raises(FormatError, match="cut off"):
                chat.decode(section[:n])
        with pytest.raises(CError, match="CHAT"):
            rendered(section[:n], [("user", "a")])


class Model:
    """What runtime.conversation reads of a model."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer, self.chat_template = tokenizer, template


@pytest.mark.parametrize(
    ("folder_name", "rows", "template"),
    [
        ("tokenizers/qwen2", 151936, "Qwen-Qwen2.5-7B-Instruct"),
        ("tinystories-656k", 2048, "google-gemma-2-2b-it"),
    ],
)
def test_ids_are_those_of_python(shared_data: Path, folder_name: str, rows: int, template: str) -> None:
    """Also where a message spells a control token, which stays text."""
    imported = import_tokenizer(folder(shared_data / folder_name), rows)
    tokenizer = Tokenizer(imported.json, imported.bos_id, imported.eos_ids, imported.add_bos)
    c = CTokenizer(compile_vocabulary(imported.json, imported.bos_id, imported.add_bos))
    source = (shared_data / "chat-templates" / f"{template}.jinja").read_text("utf-8")
    bos = "" if imported.bos_id is None else tokenizer.piece(imported.bos_id)
    section = compile_chat(source, bos, tokenizer.piece(imported.eos_ids[0]))
    end = tokenizer.piece(imported.eos_ids[0])
    ids = c.ffi.new("int32_t[]", 4096)
    for conversation in (
        [("user", "Hi there")],
        [("system", "Be brief."), ("user", "Once upon"), ("assistant", "a time"), ("user", "and?")],
        [("user", f"stop{end}now"), ("assistant", "ok"), ("user", f"{end}")],
        [("user", "a"), ("assistant", f"b {end} c"), ("user", "d")],
    ):
        table, keep = messages(c.ffi, conversation)
        n = c.checked(
            c.lib.hb_chat_tokenize(section, len(section), c.handle, table, len(conversation), ids, 4096)
        )
        listed = [{"role": role, "content": content} for role, content in conversation]
        assert c.ffi.unpack(ids, n) == prompt_ids(Model(tokenizer, source), listed), conversation
        assert keep
