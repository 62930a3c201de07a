"""What every script shares: errors in one line, exit codes, nearest-flag suggestions."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable

from .errors import UserError


class OneLineErrors:
    """Mixin for `argparse.ArgumentParser`: one clear line and exit code 2, no usage dump."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):
        namespace, leftovers = self.parse_known_args(args, namespace)
        for word in leftovers:
            flag = word.split("=", 1)[0]
            nearest = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; {self.prog} --help lists them all"
            self.error(f"{'unknown flag' if flag.startswith('-') else 'unexpected argument'} {flag}{hint}")
        return namespace


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """`argparse.ArgumentParser` with one-line errors and no abbreviated flags."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and turns what a user can mend into one line and exit code 2.

    `main` may return an exit code. Ctrl-C exits with 130, quietly. Of several processes only the first one speaks.
    """
    prog = os.path.basename(sys.argv[0])
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{prog}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `classify.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
