"""A video that goes on and on: memory and time of a chunk stay what they are.

CI makes 600 chunks. The run in docs/results.md: SOAK=10000 pytest -s tests/serve/test_soak.py
"""

import os
import resource
import time

import jax
import numpy as np
import pytest

import salt_jax
from salt_jax.rollout import sampler
from salt_jax.serve.messages import Say
from salt_jax.serve.offers import make_offer
from salt_jax.serve.viewer import Frames
from tests.helpers import BLUE, RED
from tests.serve.engines import LIMITS, watched

CHUNKS, WARM = int(os.environ.get("SOAK", "600")), 200
KEPT = 4 << 20  # so that states are thinned within the warm chunks


@pytest.mark.slow
@pytest.mark.optimized
def test_ten_thousand_chunks_need_what_two_hundred_do(tmp_path):
    offer = make_offer(salt_jax.load("shapes_causal"))
    times, marks = [time.perf_counter()], {}
    with watched(offer, tmp_path, LIMITS._replace(kept=KEPT)) as (engine, get):
        while len(times) <= CHUNKS:
            if not isinstance(get(), Frames):
                continue
            times.append(time.perf_counter())
            if len(times) % 50 == 0:
                engine.say("viewer", Say((RED, BLUE)[len(times) // 50 % 2]))
            if len(times) in (WARM, CHUNKS):
                host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                arrays = sum(array.nbytes for array in jax.live_arrays()) / 2**20
                marks[len(times)] = host, arrays, sampler.make_chunk.jitted._cache_size()
    (host, arrays, programs), (host_now, arrays_now, programs_now) = marks[WARM], marks[CHUNKS]
    gaps = 1e3 * np.diff(times)
    early, late = np.median(gaps[50:WARM]), np.median(gaps[-150:])
    print(
        f"\n{CHUNKS} chunks in {times[-1] - times[0]:.0f} s; after {WARM} and at the end: "
        f"{early:.1f} and {late:.1f} ms a chunk, host memory at most {host:.0f} and {host_now:.0f} "
        f"MiB, arrays {arrays:.1f} and {arrays_now:.1f} MiB"
    )
    assert programs_now == programs
    assert arrays_now < arrays + 2 * KEPT / 2**20
    assert host_now < 1.15 * host + 2 * KEPT / 2**20  # malloc keeps pieces
