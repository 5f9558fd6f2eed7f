"""A command line that tells every mistake in one line: status 2 when the command line is wrong, 1 for anything else."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from mms.errors import MMSError


class Program(click.Group):
    """The top of a command; its name stands before its errors."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            status = super().main(*args, **extra | {"standalone_mode": False, "prog_name": self.name})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            self.fail(error.format_message(), error.exit_code)
        except MMSError as error:
            self.fail(error.message)
        except (click.Abort, KeyboardInterrupt):
            self.fail("interrupted", 130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            self.fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
        sys.exit(status if isinstance(status, int) else 0)

    def fail(self, message: str, status: int = 1) -> NoReturn:
        click.echo(f"{self.name}: error: {' '.join(message.split())}", err=True)
        sys.exit(status)
