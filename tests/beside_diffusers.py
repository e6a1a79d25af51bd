"""python -m tests.beside_diffusers [ROUNDS]: the time of a gradient of Wan beside diffusers', on
this CPU.

Width 768, 6 layers, 576 tokens, 64 rows of text, float32, the same random weights; mean square of
the output, its gradient by all parameters. Networks take turns in one process; printed are medians
of the ratios to diffusers' turn of the same round, and their quartiles. Needs torch and diffusers
(requirements-dev.txt).
"""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

from salt_jax.models.attention import compute_here
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.wan import Inputs, apply_wan
from salt_jax.types import Conditioning
from tests.helpers import randomised, shapes_of, to_diffusers, wan_inputs, wan_of_diffusers

CONFIG = WanConfig(768, 6, 6, 3072, 16, 16, (1, 2, 2), 256, 64, 256, 0, 1e-6)
REMAT = ("none", "all", "dots_no_batch")


def ours(
    compute: Compute, params: dict, x: np.ndarray, t: np.ndarray, text: np.ndarray
) -> Callable[[], None]:
    inputs = Inputs(x, t, Conditioning(text))

    def loss(p):
        return jnp.square(apply_wan(p, inputs, CONFIG, compute)).mean()

    gradient = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(gradient(params))


def theirs(params: dict, x: np.ndarray, t: np.ndarray, text: np.ndarray) -> Callable[[], None]:
    network = wan_of_diffusers(CONFIG)
    network.load_state_dict(to_diffusers(params, CONFIG))
    given = [torch.tensor(z) for z in (x.transpose(0, 4, 1, 2, 3), t, text)]

    def gradient():
        network.zero_grad()
        network(*given).sample.square().mean().backward()

    return gradient


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    params = jax.tree.map(jnp.asarray, randomised(shapes_of(CONFIG), 1))
    given = wan_inputs(2, CONFIG, batch=1, frames=4, height=24, width=24, rows=64)
    kernel = compute_here(CONFIG, jnp.float32).kernel
    runs = {
        f"remat={how}": ours(Compute(remat=how, kernel=kernel), params, *given) for how in REMAT
    }
    runs["diffusers"] = theirs(params, *given)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compiles
        run()
    for i in tqdm(range(rounds)):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        ratio = np.array(taken) / seconds["diffusers"]
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        print(
            f"{name:20} {np.median(taken):.3f} s, {middle:.2f} of diffusers ({low:.2f} to "
            f"{high:.2f})"
        )


if __name__ == "__main__":
    main()
