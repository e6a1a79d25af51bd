"""Videos that are forked."""

import numpy as np
import pytest

import salt_jax
from salt_jax.serve.messages import Side
from salt_jax.serve.take import begin, fork_at, go_on, nbytes, record
from tests.helpers import BLUE, RED

MEMORY = salt_jax.CachePolicy(chunk=3, window=9, sink=3, positions="relative")


@pytest.fixture(scope="module")
def model():
    return salt_jax.load("shapes_causal")


def watch(model, take, prompts, kept):
    frames = []
    for prompt in prompts:
        made, take = go_on(model, take, prompt, kept)
        frames.append(model.parts.to_bytes(made.decoded))
    return np.stack(frames), take


@pytest.mark.parametrize("states", [2, 3, 100])
def test_a_fork_at_any_moment_is_what_the_video_was_there(model, states):
    """Whether the state of that moment was kept, or an earlier one."""
    first = begin(model, "first", Side("m", 2, "", 5), MEMORY, RED)
    kept = states * nbytes(first.live)
    prompts = [RED] * 3 + [BLUE] * 5
    shown, take = watch(model, first, prompts, kept)
    assert len(take.states) <= max(states, 2)
    for frame in (0, 7, 12, 23):
        chunk = frame // 3
        new = fork_at(model, take, "second", frame)
        assert new.live.frames == 3 * chunk and new.origin == ("first", 3 * chunk)
        again, _ = watch(model, new, prompts[chunk:], kept)
        np.testing.assert_array_equal(again, shown[chunk:])
    with pytest.raises(ValueError, match="has not come so far"):
        fork_at(model, take, "third", 24)
    assert record(model, take)["prompts"] == {"0": RED, "9": BLUE}
