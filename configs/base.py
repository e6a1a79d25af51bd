"""Every key at its default, as salt_jax/config/schema.py explains it; docs/guide.md has the table.

Other configs are deltas of this one; an unknown key is an error.
"""

from typing import Any

from salt_jax.config.reading import to_config_dict
from salt_jax.config.schema import Recipe


def get_config() -> Any:  # a ConfigDict; its attributes are not known to a type checker
    return to_config_dict(Recipe())
