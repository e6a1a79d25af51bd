"""Arrays on a mesh, for tests that hand their own to a step."""

from typing import Any

import jax


def place(tree: Any, shardings: Any) -> Any:
    """Copies of all arrays, laid out as told. Always copies: donating one never frees what it was
    made from.

    In a run of several processes every process passes the same, whole values.
    """

    def put(x: Any, sharding: Any) -> jax.Array:
        # An array that is copied to several devices is itself taken as one of the copies, whatever
        # may_alias says.
        return jax.device_put(
            x.copy() if isinstance(x, jax.Array) else x, sharding, may_alias=False
        )

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))
