"""A conversation with a model over one session: what was said, what fits the context, what was thought.

Each turn feeds only what the session does not hold yet. When the context is too short for all that was said, whole
turns are dropped from the front, never the system prompt, and the caller is told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.generate import Generation, generate
from halfbyte.runtime.library import write_json
from halfbyte.runtime.model import CHUNK, Model
from halfbyte.runtime.speculate import check_draft
from halfbyte.runtime.thoughts import marks, thoughts_after

_MAX_FILE = 64 << 20
_LEAST_ANSWER = 4  # an answer finds at least a quarter of the context, or max_tokens


@dataclass
class Turn:
    """An answer in progress. dropped: messages that no longer fit. reused: prompt tokens the session held."""

    prompt_tokens: int = 0
    reused: int = 0
    dropped: int = 0
    generation: Generation | None = None
    text: str = ""


@dataclass
class Dialogue:
    """A chat. `messages` are dicts of role and content, without the system prompt.

    options    the fields of `runtime.sampler.Sampling` that are not default
    variables  further variables of the chat template, such as enable_thinking
    draft      a smaller model of the same tokenizer that guesses; UsageError for another's
    """

    model: Model
    system: str = ""
    max_tokens: int = 1024
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    lookup: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    draft: Model | None = None

    def __post_init__(self) -> None:
        if self.draft is not None:
            check_draft(self.model, self.draft)
        self.session = self.model.session()
        self.turns = self.answer_tokens = self.prompt_tokens = self.reused_tokens = 0
        self.seconds = 0.0

    def ask(self, text: str) -> Generator[tuple[bool, str], None, Turn]:
        """Answer a message: yields (is a thought, text), also ('' while the prompt is fed), and returns the turn.

        Closing it keeps what was said so far; a message that nothing was answered to is forgotten. Raises UsageError
        for a message that does not fit the context alone; the chat is then as it was.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        turn = Turn()
        try:
            ids = self._fitting(turn)
            yield from self._feed(turn, ids)
        finally:
            answer = turn.text.strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages = before
        return turn

    def renew(self) -> None:
        """Start from an empty session, after a step that was interrupted."""
        self.session = self.model.session()

    def undo(self) -> str:
        """Forget the last message and its answer; the message. Raises UsageError where there is none."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return last["content"]
        raise UsageError("nothing was said yet")

    def reset(self) -> None:
        """Forget all messages; the system prompt stays."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Write the chat as JSON. Raises HalfbyteError when it cannot be written."""
        chat = {"system": self.system, "messages": self.messages, "model": self.model.file.path.name}
        write_json(path, {"halfbyte_chat": 1, **chat})

    def load(self, path: Path) -> None:
        """Take up a chat that was saved. Raises HalfbyteError for a file that is none; the chat is then as it was."""
        try:
            if path.stat().st_size > _MAX_FILE:
                raise ValueError
            found = json.loads(path.read_text("utf-8"))
            system, messages = found["system"], [dict(m) for m in found["messages"]]
            roles = [m["role"] for m in messages]
            texts = [system, *(m["content"] for m in messages)]
        except OSError as error:
            raise HalfbyteError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{path} is not a saved chat") from None
        if roles != ["user", "assistant"] * (len(roles) // 2) or not all(isinstance(t, str) for t in texts):
            raise UsageError(f"{path} is not a saved chat")
        self.system = system
        self.messages = [{"role": m["role"], "content": m["content"]} for m in messages]

    def _fitting(self, turn: Turn) -> list[int]:
        """The prompt; older turns are dropped until an answer has room."""
        context = self.model.context_length
        room = min(self.max_tokens, context // _LEAST_ANSWER)
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            ids = prompt_ids(self.model, [*system, *self.messages], **self.variables)
            if len(ids) + room <= context:
                return ids
            if len(self.messages) < 3:
                if len(ids) < context:  # a shorter answer, then
                    return ids
                raise UsageError(f"the message has {len(ids)} tokens; the context is {context}")
            del self.messages[:2]
            turn.dropped += 2

    def _feed(self, turn: Turn, ids: list[int]) -> Generator[tuple[bool, str], None, None]:
        session = self.session
        held = next(
            (i for i, (a, b) in enumerate(zip(session.ids, ids)) if a != b), min(session.position, len(ids))
        )
        held = min(held, len(ids) - 1)  # the last token's logits are what the answer starts from
        session.rewind(session.position - held)
        turn.prompt_tokens, turn.reused = len(ids), held
        left = ids[held:]
        while len(left) > CHUNK:
            session.feed(left[:CHUNK])
            left = left[CHUNK:]
            yield False, ""
        how = {"lookup": self.lookup, "draft": self.draft, **self.options}
        turn.generation = answer = generate(
            self.model, left, max_tokens=self.max_tokens, session=session, shown=marks(self.model), **how
        )
        thoughts = thoughts_after(self.model, ids)
        try:
            for piece in answer:
                for thought, text in thoughts.push(piece) or [(False, "")]:
                    turn.text += "" if thought else text
                    yield thought, text
            for thought, text in thoughts.flush():
                turn.text += "" if thought else text
                yield thought, text
        finally:
            answer.close()
            self.turns += 1
            self.prompt_tokens += turn.prompt_tokens
            self.reused_tokens += turn.reused
            self.answer_tokens += len(answer.ids)
            self.seconds += answer.decode_seconds


def history_path(home: Path) -> Path:
    """Where the lines that were typed are kept; its folder is made. Only its owner may read it."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "history"
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    return path
