"""What all programs share: one clear line for an error that is the user's to mend."""

import sys
from collections.abc import Callable

from absl import app

from salt_jax.errors import UserError


def run_main(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with a UserError printed as one line and exit code 2."""

    def guarded(argv):
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
