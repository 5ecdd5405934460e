"""The README's examples, run as they stand."""

import re
from pathlib import Path

import pytest
from story import story_folder

from halfbyte.runtime.cli import COMMANDS, parser

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    story_folder(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert code
    for block in code:
        exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().out
    assert (tmp_path / "chat.hbs").is_file()


def test_commands_shown_exist_with_their_options() -> None:
    shown = re.findall(r"^\$ halfbyte (.+?)(?: +#.*)?$", "\n".join(blocks("console")), re.MULTILINE)
    assert {line.split()[0] for line in shown} <= set(COMMANDS) and len(shown) > 5
    for line in shown:
        words = re.findall(r'"[^"]*"|\S+', line)
        parser().parse_args([w.strip('"') for w in words])  # exits on an unknown option
