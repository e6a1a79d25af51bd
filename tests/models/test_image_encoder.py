"""The CLIP image encoder against transformers, the published size, and what the denoiser
relies on.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.image_encoder import PRESETS, encode_image, init_image_encoder
from tests.helpers import randomised, shapes_of
from tests.models.oracles import CLIP, clip_from_transformers, clip_of_transformers

encode = jax.jit(encode_image, static_argnums=(2, 3))


shapes = partial(shapes_of, init=init_image_encoder)


def random_params():
    return jax.tree.map(jnp.asarray, randomised(shapes(CLIP), 0, std=0.2))


def random_pixels(batch=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, 42, 42, 3)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parity
def test_equals_transformers_behind_the_last_layer_but_one():
    torch = pytest.importorskip("torch")
    oracle = clip_of_transformers()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in oracle.named_parameters():
            is_gain = "norm" in name and name.endswith("weight")
            # fc1 wide enough to tell GELU's forms apart
            w.copy_(
                is_gain
                + (0.5 if "fc1" in name else 0.1) * torch.randn(w.shape, generator=generator)
            )
    params = clip_from_transformers({k: v.numpy() for k, v in oracle.state_dict().items()}, 3)
    chex.assert_trees_all_equal_shapes(params, shapes(CLIP))

    pixels = random_pixels()
    with torch.no_grad():
        seen = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        want = oracle(pixel_values=seen, output_hidden_states=True).hidden_states[-2].numpy()
    got = encode(jax.tree.map(jnp.asarray, params), pixels, CLIP)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    assert np.abs(want).max() > 1  # the tolerance is judged against outputs of order one


def test_full_size_is_the_published_model_without_its_last_layer_and_norm():
    tree, config = shapes(PRESETS["vit-h-14"]), PRESETS["vit-h-14"]
    per_layer, final_norm = 19_677_440, 2 * 1280
    assert sum(w.size for w in jax.tree.leaves(tree)) == 630_766_080 - per_layer - final_norm
    assert tree["position_embedding"].shape == (257, 1280)
    assert tree["patch_embedding"]["kernel"].shape == (14, 14, 3, 1280)
    features = jax.eval_shape(
        lambda p, x: encode_image(p, x, config), tree, jnp.zeros((1, 224, 224, 3), jnp.float32)
    )
    assert features.shape == (1, 257, 1280)


def test_fresh_tiny_weights_tell_pictures_apart():
    config = PRESETS["tiny"]
    params = jax.jit(lambda k: init_image_encoder(k, config))(jax.random.key(0))
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 28, 28, 3)), jnp.float32)
    features = np.asarray(encode(params, pixels, config))
    assert features.shape == (2, 5, 40)
    assert np.abs(features[0] - features[1]).mean() > 0.1
    assert 0.3 < features.std() < 3


def test_patches_are_read_row_by_row_behind_the_class_token():
    """Exchanging two patches of the picture together with their positions exchanges their
    features.
    """
    params, pixels = random_params(), random_pixels(1)
    swapped = (
        pixels.at[:, :14, 28:].set(pixels[:, 28:, :14]).at[:, 28:, :14].set(pixels[:, :14, 28:])
    )
    order = np.array(
        [0, 1, 2, 7, 4, 5, 6, 3, 8, 9]
    )  # patch 2 is on the right of row 0, patch 6 on the left of row 2
    moved = {**params, "position_embedding": params["position_embedding"][order]}
    features = encode(params, pixels, CLIP)
    np.testing.assert_allclose(encode(moved, swapped, CLIP), features[:, order], atol=1e-5)
    assert np.abs(features[:, 3] - features[:, 7]).max() > 0.1


def test_half_precision_stays_near_float32():
    """Weights stored in float16, as published, run in float32 and in bfloat16."""
    params, pixels = random_params(), random_pixels()
    stored = jax.tree.map(lambda w: w.astype(jnp.float16), params)
    exact = np.asarray(encode(params, pixels, CLIP))
    for dtype, rounding in ((jnp.float32, jnp.float16), (jnp.bfloat16, jnp.bfloat16)):
        rough = encode(stored, pixels, CLIP, dtype)
        assert rough.dtype == dtype
        error = np.abs(np.asarray(rough, np.float32) - exact).mean()
        assert 0 < error < 4 * float(jnp.finfo(rounding).eps) * exact.std()


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"reads 42 x 42 pixels, got \(28, 42\)"):
        encode_image(shapes(CLIP), jnp.zeros((1, 28, 42, 3)), CLIP)
