"""The networks of a recipe as denoisers, on the devices that a program is for."""

from dataclasses import replace

from jax.sharding import Mesh

from salt_jax.config.schema import Recipe
from salt_jax.models.attention import choose_kernel, is_flash
from salt_jax.models.denoiser import WanDenoiser, wan_denoiser
from salt_jax.models.layout import platform_of
from salt_jax.models.presets import Kernel, WanConfig


def denoiser_of(recipe: Recipe, mesh: Mesh | None, config: WanConfig | None = None) -> WanDenoiser:
    """Student and critic, or a network of another size.

    On a mesh every device keeps to its share of a batch that divides. Without one it runs on the
    first device here.
    """
    c = config or recipe.wan
    kernel = attention_kernel(recipe, c, platform_of(mesh))
    compute = replace(recipe.compute, kernel=kernel, mesh=mesh)
    return wan_denoiser(c, compute, recipe.clip_shape[0], recipe.memory.chunk)


def attention_kernel(recipe: Recipe, config: WanConfig, platform: str) -> Kernel:
    """What a network's attention runs on devices of a platform."""
    asked = recipe.model.attention
    best = choose_kernel(platform, recipe.compute.dtype, config.head_width)
    return best if asked == "auto" else asked


def runs_flash(recipe: Recipe, platform: str) -> bool:
    """Whether the student's attention keeps no scores there."""
    return is_flash(attention_kernel(recipe, recipe.wan, platform))
