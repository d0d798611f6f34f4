"""The Typer application: registers commands, and turns every exception into a message and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llmsurgery import __version__
from llmsurgery.cli.apply import apply
from llmsurgery.cli.audit import audit
from llmsurgery.cli.compare import compare
from llmsurgery.cli.debias import debias
from llmsurgery.cli.diff import diff
from llmsurgery.cli.eval import evaluate
from llmsurgery.cli.inspect import inspect
from llmsurgery.cli.lens import lens
from llmsurgery.cli.linearity import linearity
from llmsurgery.cli.methods import methods
from llmsurgery.cli.neurons import neurons
from llmsurgery.cli.output import Output
from llmsurgery.cli.prune import prune
from llmsurgery.cli.recipes import recipes
from llmsurgery.cli.recover_alignment import recover_alignment
from llmsurgery.cli.redirect import redirect
from llmsurgery.cli.remove_layernorm import remove_layernorm
from llmsurgery.cli.revert import revert
from llmsurgery.cli.run import run_recipe
from llmsurgery.cli.stack import stack
from llmsurgery.cli.trace import trace
from llmsurgery.cli.unlearn import unlearn
from llmsurgery.cli.verify import verify
from llmsurgery.errors import ResourceError, SurgeryError, UsageError

app = typer.Typer(
    name="llmsurgery",
    help="Change a trained language model after the fact, and prove it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("unlearn", unlearn),
    ("redirect", redirect),
    ("recover-alignment", recover_alignment),
    ("prune", prune),
    ("remove-layernorm", remove_layernorm),
    ("debias", debias),
    ("run", run_recipe),
    ("recipes", recipes),
    ("eval", evaluate),
    ("compare", compare),
    ("inspect", inspect),
    ("trace", trace),
    ("neurons", neurons),
    ("lens", lens),
    ("linearity", linearity),
    ("diff", diff),
    ("apply", apply),
    ("stack", stack),
    ("revert", revert),
    ("verify", verify),
    ("methods", methods),
):
    app.command(name)(command)
app.add_typer(audit, name="audit")

INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmsurgery {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: The words after the program's name.

    Returns:
        The exit code of the product contract.
    """
    arguments = arguments or ["--help"]
    words = set(arguments)
    output = Output("--json" in words, bool({"-q", "--quiet"} & words), bool({"-v", "--verbose"} & words))
    # A job that is told to stop should clean up like one that is interrupted by hand.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = app(list(arguments), standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SurgeryError as error:
        if type(error) is SurgeryError:
            output.bug(error)
        else:
            output.error(error, error.exit_code)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        output.error(_InterruptedError("interrupted", "", "nothing was published"), INTERRUPTED)
        return INTERRUPTED
    except MemoryError:
        wrapped = ResourceError("out of memory", "an allocation failed", "use a machine with more memory")
        output.error(wrapped, wrapped.exit_code)
        return wrapped.exit_code
    except OSError as error:
        wrapped = ResourceError(f"{type(error).__name__}: {error}", "the system refused a file operation", "")
        output.error(wrapped, wrapped.exit_code)
        return wrapped.exit_code
    except Exception as error:
        return _other(output, error)
    finally:
        signal.signal(signal.SIGTERM, previous)


class _InterruptedError(SurgeryError):
    kind = "interrupted"


def _other(output: Output, error: Exception) -> int:
    # Typer carries its own copy of Click and does not export the class of its usage errors.
    message = getattr(error, "format_message", None)
    if callable(message) and getattr(error, "exit_code", None) == UsageError.exit_code:
        usage = UsageError(str(message()), "", "llmsurgery COMMAND --help lists the options")
        output.error(usage, usage.exit_code)
        return usage.exit_code
    output.bug(error)
    return 1
