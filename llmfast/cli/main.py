"""The `llmfast` command: a table of commands, each imported when it runs, and errors as one line."""

import errno
import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import LLMFastError

# Name -> (function, what it does).
COMMANDS = {
    "train": ("llmfast.cli.train:train", "Train a model; with no arguments, the main job on Python's own source."),
    "generate": ("llmfast.cli.generate:generate", "Continue a text with a trained model."),
    "chat": ("llmfast.cli.generate:chat", "Talk with an imported model that has a chat template."),
    "eval": ("llmfast.cli.evaluate:evaluate", "Score a model on a text: bits per byte, baselines, loss by position."),
    "plot": ("llmfast.cli.plot:plot", "Draw the curves of one or several runs."),
    "data": ("llmfast.cli.data:data", "Prepare a text for training: tokenizer, token shards and manifest."),
    "tokenizer": ("llmfast.cli.tokenizer:tokenizer", "Train a tokenizer, or encode and decode with one."),
    "import": ("llmfast.cli.convert:import_model", "Make a run of a model in Hugging Face's format, or of its hub."),
    "export": ("llmfast.cli.convert:export_model", "Write a run's model in Hugging Face's format."),
    "bench": ("llmfast.cli.bench:bench", "Time an op on every backend against the reference."),
    "doctor": ("llmfast.cli.doctor:doctor", "Show the device, versions, and which backend runs each op and why."),
}


# Of the machine, not of this program: one line even where Python does not know which file it was.
MACHINE_ERRORS = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "EFBIG", "ESTALE")
}
UNWRITABLE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG")}


class LazyGroup(TyperGroup):
    """Commands of the table: listing them imports none, running one imports its module only."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(COMMANDS[args[0]][0], args[0]), rest


def _load(target: str, name: str) -> Any:
    module, function = target.split(":")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(importlib.import_module(module), function))
    return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llmfast {__version__}")
        raise typer.Exit


@app.callback()
def _llmfast(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A GPT engine: train, generate and measure."""


def main() -> None:
    """Run the command line. Errors of the caller's making are one line on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text of a model may hold what a narrow encoding does not
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # while its failure can still be reported
    except LLMFastError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in MACHINE_ERRORS:  # not about a file that the caller named
            raise
        remedy = "; free space or give another folder" if error.errno in UNWRITABLE else ""
        _drop_output()
        _fail(f"{error.filename or 'a file or the output'}: {error.strerror or error}{remedy}")


def _drop_output() -> None:
    """Where standard output cannot be written, lead what is left of it nowhere: Python flushes it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> None:
    print("llmfast: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
