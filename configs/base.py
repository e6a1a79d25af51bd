"""Every key at its default, as salt_jax/config/schema.py explains it; docs/guide.md has the table.

Other configs are deltas of this one; an unknown key is an error.
"""

from salt_jax.config.reading import to_config_dict
from salt_jax.config.schema import Recipe
from salt_jax.keys import Config


def get_config() -> Config:
    return to_config_dict(Recipe())
