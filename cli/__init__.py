"""The `gradstore` command. It sits on top of every package and imports them inside the commands that need them,
so that `gradstore --help` and a query do not wait for torch.

Exit status: 0, done; 1, the work failed; 2, the request was wrong. Errors are one line on standard error.
"""

import os
import sys
from typing import Any

import typer

from gradstore.cli.app import COMMANDS, application
from gradstore.errors import GradstoreError, near_miss

EXTRA_OF = dict.fromkeys(("torch", "transformers", "safetensors", "jinja2", "math_verify", "reasoning_gym"), "sketch")
"""Module that a plain installation lacks -> the extra that brings it."""


_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a line that it cannot parse; its click has no public name."""


def main() -> None:
    """Run the command line."""
    from gradstore.cli.help import page
    from gradstore.cli.show import open_streams, take_any_text
    from gradstore.cli.threads import wait_asleep

    open_streams()
    take_any_text()
    wait_asleep()
    app = application(sys.argv[1:])
    try:
        if (text := page(app, sys.argv[1:])) is not None:
            print(text, flush=True)
            sys.exit(0)
        status = app(standalone_mode=False)
    except _UsageError as error:
        _fail_usage(error)
    except GradstoreError as error:
        _fail(str(error), error.exit_status)
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(
            f"{error.filename or 'standard output, or a file'}: {error.strerror or error}", 2 if error.filename else 1
        )
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        _fail(f"this needs {error.name}, which is not installed: pip install 'gradstore[{EXTRA_OF[error.name]}]'", 2)
    else:
        sys.exit(status or 0)


def _fail_usage(error: Any) -> None:
    """One line for what could not be parsed: what it is, its near miss, and where the options are listed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    words, context = [], error.ctx
    while context is not None and context.parent is not None:
        words.append(context.info_name)
        context = context.parent
    if not words and sys.argv[1:2] and sys.argv[1] in COMMANDS:  # the parser knows no context
        words = sys.argv[1:2]
    command = " ".join(["gradstore", *reversed(words)])
    message = error.format_message()
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        asked = error.option_name.lstrip("-")
        near = [name for name in error.possibilities or () if near_miss(asked, [name.lstrip("-")])]
        message = f"{error.message}; did you mean {' or '.join(near[:2])}?" if near else error.message
    message = " ".join(message.removesuffix(", unable to parse string as an integer").split()).rstrip(".")
    _fail(f"{message[:1].lower()}{message[1:]} ({command} --help)", error.exit_code)


def _fail(message: str, status: int) -> None:
    from gradstore.cli.show import print_error

    print_error(message)
    sys.exit(status)
