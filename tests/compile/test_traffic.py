"""Bytes along the axes of a mesh and their seconds, against what is counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from salt_jax.compile.hlo import read
from salt_jax.compile.target import read_target
from salt_jax.compile.traffic import group, rate, seconds

HOSTS = {"data": 4, "fsdp": 2, "context": 4, "tensor": 1}  # of 8 GPUs each


@pytest.mark.parametrize(
    "axes, whole, side_by_side",
    [
        ("fsdp", 2, 2),
        ("context", 4, 4),
        ("fsdp+context", 8, 8),
        ("data", 4, 1),
        ("data+fsdp", 8, 2),
    ],
)
def test_groups_and_those_of_them_on_one_host(axes, whole, side_by_side):
    assert group(HOSTS, axes, 8) == (whole, side_by_side)


def test_rates_are_those_of_the_slowest_way():
    """NVLink inside a host; a port for each GPU of the group beyond it; one slice has links
    only.
    """
    gpus, slice_ = read_target("gpu:h100:4x8"), read_target("tpu:v5p:2x4x4")
    assert rate(gpus, HOSTS, "fsdp+context") == 450e9
    assert rate(gpus, HOSTS, "data") == 50e9 and rate(gpus, HOSTS, "data+fsdp") == 100e9
    assert rate(gpus, HOSTS, "data+fsdp+context") == 400e9
    assert {rate(slice_, HOSTS, axes) for axes in ("data", "fsdp", "data+fsdp")} == {200e9}
    sent = {"fsdp": 900e9, "data": 25e9, "": 1e9}  # what a device sends itself takes no time
    assert seconds(gpus, HOSTS, sent) == pytest.approx(2.5)


@pytest.mark.optimized
def test_a_sharded_gradient_gathers_its_weights_twice():
    """Six layers over data 2 x fsdp 4, scanned: forward and backward gather each weight along fsdp;
    nothing but gradients runs along data.
    """
    sizes = {"data": 2, "fsdp": 4}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(sizes))
    layers, width, rows = 6, 32, 64
    cut, batch = (
        NamedSharding(mesh, spec) for spec in (P(None, None, "fsdp"), P(("data", "fsdp")))
    )

    def loss(w, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.sin(x @ w), batch), None

        return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

    w = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((rows * 8, width), jnp.float32, sharding=batch)
    compiled = jax.jit(jax.grad(loss), out_shardings=cut).lower(w, x).compile()
    found = read(compiled.as_text(), sizes)
    weights = layers * width * width * 4  # bytes
    assert found.collectives["all-gather"].over == {"fsdp": 2 * weights * 3 // 4}
    # of n devices each sends 2 (n - 1) / n: the whole along fsdp, then a part of 4 along data
    summed = found.collectives["all-reduce"].over
    assert summed == {"fsdp": 2 * weights * 3 // 4, "data": weights // 4}
    assert set(found.collectives) == {"all-gather", "all-reduce"} and not found.open_loops
