"""Where the time of forward and backward goes, ours and diffusers': the same with parts left out.

    python -m tests.peers.ablation [ROUNDS]

Wan of width 768 on a CPU, as `launch.bench --peer=diffusers --what=gradient` has it; a part that is
left out passes on what it is given, so results mean nothing and times are what is left. Prints
medians, and ratios to diffusers' whole in the same round with their quartiles. Wants an idle
machine.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from configs import self_forcing
from salt_jax.config.reading import read_recipe
from salt_jax.models import blocks
from salt_jax.peers import parts, torch_wan
from salt_jax.peers.parts import Work
from salt_jax.peers.turns import Part, Side, take_turns

torch = torch_wan.torch
NORMS = ("FP32LayerNorm", "RMSNorm", "LayerNorm")


class SameLayer(nn.Module):
    """Stands where a LayerNorm stood."""

    epsilon: float = 0.0
    use_fast_variance: bool = False

    def __call__(self, x):
        return x


def without_norms(network):
    for module in network.modules():
        for name, child in module.named_children():
            if type(child).__name__ in NORMS:
                setattr(module, name, torch.nn.Identity())
    return network


def attend_to_nothing(query, key, value, **how):
    """In place of self-attention; cross-attention has fewer keys than queries."""
    if query.shape == key.shape:
        return query + key + value
    return torch_wan.attend(query, key, value, **how)


@contextmanager
def left_out(what: str) -> Iterator[None]:
    """Without these parts while sides are made and run."""
    made, functional = torch_wan.wan, torch.nn.functional
    with ExitStack() as stack:
        if what == "no norms":
            stack.enter_context(patch.object(blocks, "layer_norm", lambda x, eps: x))
            stack.enter_context(patch.object(nn.RMSNorm, "__call__", lambda self, x: x))
            stack.enter_context(patch.object(nn, "LayerNorm", SameLayer))
            bare = lambda *args: without_norms(made(*args))
            stack.enter_context(patch.object(torch_wan, "wan", bare))
        if what == "no self-attention":
            same = lambda q, k, v, *rest: q + k + v
            stack.enter_context(patch.object(blocks, "chunked_attention", same))
            name = "scaled_dot_product_attention"
            stack.enter_context(patch.object(functional, name, attend_to_nothing))
        yield


def under(what: str, run: Callable[[], object]) -> Callable[[], object]:
    def again():
        with left_out(what):
            return run()

    return again


def main(rounds: int) -> None:
    config = self_forcing.get_config("wan")
    config.update(batch_size=1, weights="", init_from="", text_encoder="wan-tiny")
    config.model.update(preset="wan2.1-t2v-small", dtype="float32", remat="none")
    config.teacher.update(preset="", weights="")
    config.data.clip, config.mesh.fsdp = (9, 16, 16), 1
    work = Work(read_recipe(config), None, 4, False, "cpu")
    params, every = work.params(), Part()
    with patch.object(Work, "params", lambda self: params):  # also of the parts that are left out
        for what in ("whole", "no norms", "no self-attention"):
            jax.clear_caches()
            with left_out(what):
                for who, side in parts.gradient(work).items():
                    side.run()  # compiles
                    every[f"{who}, {what}"] = Side(under(what, side.run), side.read)
    seconds = take_turns(every, tqdm(range(rounds), unit="round"))
    for who, times in seconds.items():
        low, middle, high = np.percentile(
            np.divide(times, seconds["diffusers, whole"]), [25, 50, 75]
        )
        print(f"{who:44}{np.median(times):7.3f} s   {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main(int(*sys.argv[1:] or [7]))
