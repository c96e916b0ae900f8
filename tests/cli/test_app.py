"""The command line as a whole: what it loads, and how commands end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from checkpoint_engine import errors
from checkpoint_engine.cli.app import COMMANDS, app
from checkpoint_engine.cli.console import exit_code, exit_on_error, printable, progress

HEAVY = {"fastapi", "numpy", "torch", "transformers", "uvicorn"}
MAIN = "from checkpoint_engine.cli import main; main()"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def loaded_by(statement: str) -> set[str]:
    done = python(f"{statement}; import sys; sys.stderr.write(' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_loads_nothing_heavy() -> None:
    modules = loaded_by(
        "from checkpoint_engine.cli.app import app; app(['--help'], standalone_mode=False)"
    )
    assert "checkpoint_engine.cli.status" in modules
    assert not modules & HEAVY


def test_importing_the_package_does_not_load_torch() -> None:
    modules = loaded_by("import checkpoint_engine")
    assert "checkpoint_engine" in modules
    assert "torch" not in modules


def test_help_lists_every_command_and_the_exit_codes() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for command in COMMANDS:
        assert f" {command.__name__} " in shown
    for code in (1, 2, 3, 4, 5, 130):
        assert f"{code} " in shown


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("ckpt-engine 0.")


def test_an_error_is_one_line_and_a_traceback_only_with_debug() -> None:
    done = python(MAIN, "status", "--endpoint", "no-url")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: --endpoint 'no-url' is no URL such as http://127.0.0.1:8000\n")
    done = python(MAIN, "--debug", "status", "--endpoint", "no-url")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.count("\nerror: ") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.UpdateRefused("x"), 3),
        (errors.UpdateFailed("x"), 3),
        (errors.DeadlineExceeded("x"), 4),
        (errors.SourceError("x"), 1),
        (errors.VerificationError("x"), 1),
    ],
)
def test_exit_codes(error: errors.CheckpointEngineError, code: int) -> None:
    assert exit_code(error) == code
    with pytest.raises(typer.Exit) as caught, exit_on_error(show_traceback=False):
        raise error
    assert caught.value.exit_code == code


def test_a_bug_is_not_taken_for_an_error() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error(show_traceback=False):
        _ = 1 / 0


@pytest.fixture
def silent_listener() -> Iterator[socket.socket]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


def test_interrupting_a_command_exits_with_130(silent_listener: socket.socket) -> None:
    url = f"http://127.0.0.1:{silent_listener.getsockname()[1]}"
    # Of a shell's background jobs the children ignore SIGINT.
    heeding = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"
    command = [sys.executable, "-c", heeding, "status", "--endpoint", url, "--timeout", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        connection, _ = silent_listener.accept()
        with connection:
            connection.recv(1)
            os.kill(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"


def test_printable_leaves_nothing_that_a_terminal_obeys() -> None:
    assert (
        printable("step-1\x1b[2J\x07")
        == "step-1\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}"
    )
    assert printable("two\nlines é") == "two lines é"


def test_progress_says_nothing_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress("stage", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
