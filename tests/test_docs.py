"""The documents say what is: names, settings, commands and links are compared with the code."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from checkpoint_engine.cli.app import app
from checkpoint_engine.update import coordinator, protocol

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
SOURCES = [path.read_text() for path in ROOT.glob("src/**/*.py")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        assert link.startswith("http") or (document.parent / link).exists(), link


def test_every_message_is_described() -> None:
    messages = [
        name
        for name in protocol.__all__
        if isinstance(kind := getattr(protocol, name), type)
        and issubclass(kind, msgspec.Struct)
        and kind.__struct_config__.tag is not None
    ]
    assert len(messages) > 10
    assert [name for name in messages if f"`{name}`" not in PROTOCOL] == []


def test_every_state_is_described() -> None:
    text = Path(coordinator.__file__).read_text()
    phases = set(re.findall(r'_phase(?: in \(| == |, .*= )"(\w+)"', text)) - {"done"}
    assert {"staging", "entering", "applying", "publishing"} <= phases
    assert [phase for phase in phases if f"`{phase}`" not in PROTOCOL] == []
    for outcome in ("published_unconfirmed", "kept", "quarantined", "torn", "lost", "rolled_back"):
        assert f'"{outcome}"' in text
        assert f"`{outcome}`" in PROTOCOL


def test_every_setting_is_described() -> None:
    settings = {name for text in SOURCES for name in re.findall(r"CKPT_ENGINE_[A-Z_]+", text)}
    described = (ROOT / "docs/troubleshooting.md").read_text()
    assert len(settings) >= 5
    assert [name for name in settings if f"| `{name}` |" not in described] == []


def test_troubleshooting_quotes_messages_that_the_code_has() -> None:
    everything = re.sub(r'["\']\s*\n?\s*f?["\']', "", "\n".join(SOURCES))
    rows = (ROOT / "docs/troubleshooting.md").read_text().split("## Settings")[0]
    quoted = [
        piece
        for row in re.findall(r"^\| (`[^|]*) \|", rows, flags=re.MULTILINE)
        for quote in re.findall(r"`([^`]+)`", row)
        for piece in re.split(r"\.\.\.|\bN$", quote)
        if len(piece.split()) > 2
    ]
    assert len(quoted) > 10
    assert [piece for piece in quoted if _words(piece) not in _words(everything)] == []


def test_commands_in_the_documents_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    lines = re.findall(r"^ckpt-engine (\w+)(.*)$", text, re.MULTILINE)
    assert {"replica", "update", "status", "rollback", "verify", "diff"} <= {n for n, _ in lines}
    for name, arguments in lines:
        command = commands[name]
        if hasattr(command, "commands"):  # a group: the next word is the command
            command = command.commands[arguments.split()[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known


def test_examples_in_the_documents_exist() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    lines = re.findall(r"^(?:python|torchrun .*) (examples/\S+)(.*)$", text, re.MULTILINE)
    assert {name for name, _ in lines} == {f"examples/{p.name}" for p in ROOT.glob("examples/*.py")}
    for name, arguments in lines:
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in (ROOT / name).read_text()


def test_python_in_the_readme_is_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_names_that_the_documents_import_exist() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    imports = [
        node
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("checkpoint_engine")
    ]
    assert len(imports) >= 5
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE)
        assert (ROOT / "scripts" / target).exists()


def _words(text: str) -> str:
    return " ".join(re.sub(r"\{[^}]*\}|[`\"']", " ", text).split())
