"""The negative prompts are the published ones, to the byte."""

import hashlib

from salt_jax.models.prompts import NEGATIVE_IMAGE_TO_VIDEO, NEGATIVE_TEXT_TO_VIDEO


def test_negative_prompts_are_the_published_ones():
    """Lengths and digests of the strings in Wan 2.1's shared_config.py and of what its
    image-to-video adds.
    """
    text, image = NEGATIVE_TEXT_TO_VIDEO, NEGATIVE_IMAGE_TO_VIDEO
    digest = lambda prompt: hashlib.sha256(prompt.encode()).hexdigest()
    assert (len(text), len(text.encode())) == (137, 403)
    assert digest(text) == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert len(image) == 142
    assert digest(image) == "412753d092bcf3708424769cd0f54e27973d53a12e229e5492b718457213fc2f"
