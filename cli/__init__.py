"""The `gradstore` command. It sits on top of every package and imports them inside the commands that need them,
so that `gradstore --help` and a query do not wait for torch.

Exit status: 0, done; 1, the work failed; 2, the request was wrong. Errors are one line on standard error.
"""

import sys

from gradstore.cli.app import in_order_of_work
from gradstore.errors import GradstoreError

EXTRA_OF = dict.fromkeys(("torch", "transformers", "safetensors", "jinja2", "math_verify", "reasoning_gym"), "models")
"""Module that a plain installation lacks -> the extra that brings it."""


def main() -> None:
    """Run the command line."""
    # each registers its commands
    from gradstore.cli import (  # noqa: F401
        collect,
        data,
        demo,
        fidelity,
        importing,
        merge,
        plan,
        probe,
        query,
        report,
        rollout,
        stores,
        train,
        travel,
    )
    from gradstore.cli.show import take_any_text

    take_any_text()
    try:
        in_order_of_work()()
    except GradstoreError as error:
        _fail(str(error), error.exit_status)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2 if error.filename else 1)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        _fail(f"this needs {error.name}, which is not installed: pip install 'gradstore[{EXTRA_OF[error.name]}]'", 2)
    except KeyboardInterrupt:
        _fail("interrupted; what was published is kept, the same command goes on from there", 130)


def _fail(message: str, status: int) -> None:
    from gradstore.cli.show import print_error

    print_error(message)
    sys.exit(status)
