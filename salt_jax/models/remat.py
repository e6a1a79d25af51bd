"""What of a block is kept for its backward pass; what is not is computed again.

See `models.presets.Remat`.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from salt_jax.models.presets import Remat

ATTENTION, BLOCK = "attention", "block"  # names of what a policy may keep
# the kernel, which JAX gives no name; its results are output and row sums
CUDNN = "dot_product_attention_fwd_wrapper"

_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def _attention(primitive: Primitive, *args: object, **params: object) -> bool:
    return _named(primitive, *args, **params) or primitive.name == CUDNN


def _also_attention(policy: Callable[..., bool]) -> Callable[..., bool]:
    def both(primitive: Primitive, *args: object, **params: object) -> bool:
        return policy(primitive, *args, **params) or _attention(primitive, *args, **params)

    return both


POLICIES: dict[str, Callable | None] = {
    "all": None,
    "save_attention": _attention,
    "dots": _also_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _also_attention(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def recomputed(layer: Callable, how: Remat) -> Callable:
    """A layer (tokens, each) -> (tokens, more) that keeps less for its backward pass; the function
    is the same.
    """
    if how == "none":
        return layer

    def named(tokens, each):
        return layer(checkpoint_name(tokens, BLOCK), each)

    return jax.checkpoint(named, prevent_cse=False, policy=POLICIES[how])
