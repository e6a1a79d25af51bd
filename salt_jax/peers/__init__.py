"""Networks of other projects, to be timed beside ours.

PyTorch and diffusers are no requirements of the package, and nothing outside of this room loads
them. Its modules that do raise a UserError where they are not installed.
"""

import importlib
from types import ModuleType

from salt_jax.errors import UserError


def installed(name: str) -> ModuleType:
    """A module that the package does not require.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be loaded ({error}), and without it there is no peer to time; "
            "pip install -r requirements-dev.txt in a checkout brings the versions that are tested"
        ) from error
