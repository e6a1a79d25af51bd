"""What is read off a compiled program: texts in the form of each compiler, and a program whose
traffic is known.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from salt_jax.compile.buffers import largest
from salt_jax.compile.hlo import Moved, read

# As libtpu writes: layouts with tiles, groups by mesh axes, no word of a loop's length but in its
# condition.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%cond.1 (p.1: (s32[], f32[8,4])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

%body.1 (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %ag = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %aa = f32[8,4]{1,0:T(8,128)} all-to-all(%y), \
replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp':(1)2}
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%n, %aa)
}

%open (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[], s32[]) parameter(0)
  %a = s32[] get-tuple-element(%p.3), index=0
  %b = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.2 = pred[] compare(%a, %b), direction=LT
}

%once (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[], s32[]) parameter(0)
  ROOT %ar = f32[16]{0} all-reduce(%p.4), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%part (p.5: (u32[], f32[8,4])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %p.5 = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %c = u32[]{:T(128)} get-tuple-element(%p.5), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%c, %eight), direction=LT
}

%two.parts (p.6: (u32[], f32[8,4])) -> (u32[], f32[8,4]) {
  %p.6 = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %c.1 = u32[]{:T(128)} get-tuple-element(%p.6), index=0
  %two = u32[]{:T(128)} constant(2)
  %c.2 = u32[]{:T(128)} add(%c.1, %two)
  %rs = f32[2,4]{1,0:T(8,128)} reduce-scatter(%z), \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
  ROOT %t.6 = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%c.2, %rs)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %cp = (f32[1,48]{1,0:T(1,128)S(1)}, f32[1,48]{1,0:T(1,128)}, u32[]{:S(2)}) \
collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %w.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%t.1), condition=%cond.1, body=%body.1
  %w.2 = (s32[], /*index=1*/s32[]) while(%t.2), condition=%open, body=%once
  %w.3 = (u32[], f32[8,4]) while(%t.3), condition=%part, body=%two.parts
  %splash_fwd.12 = bf16[8,4]{1,0} custom-call(%p), \
custom_call_target="tpu_custom_call", backend_config={}
  ROOT %alloc = f32[8,4] custom-call(), custom_call_target="AllocateBuffer"
}
"""


def along(calls: int, runs: int, size: int, axes: str) -> Moved:
    """Everything along the same axes, and nothing in a loop of unknown length."""
    return Moved(calls, runs, size, {axes: size}, {})


def test_the_text_of_a_tpu():
    assert read(TPU, {"data": 2, "fsdp": 4}) == (
        {
            "all-gather": along(1, 7, 7 * 64 * 3 // 4, "fsdp"),  # 64 bytes among 4 devices
            # 2 (n - 1) / n = 1 of 64 bytes between 2, in a loop whose length nobody tells
            "all-reduce": Moved(1, 1, 64, {"fsdp": 64}, {"fsdp": 64}),
            # half of fsdp, and data: 4
            "all-to-all": along(1, 7, 7 * 128 * 3 // 4, "data+fsdp"),
            "collective-permute": along(1, 1, 192, "fsdp"),
            "reduce-scatter": along(1, 4, 4 * 32 * 3, "fsdp"),  # two of eight parts at a time
        },
        {"splash_fwd (tpu_custom_call)": 1},
        1,
    )


# As XLA for GPU writes: starts with all operands, known trip counts, done that names the
# computation again.
GPU = """HloModule jit_f, num_partitions=4, replica_count=2

%wrapped (p.1: f32[16]) -> f32[8,4] {
  ROOT %rs = f32[8,4]{1,0} reduce-scatter(%p.1), \
replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%body (p.2: (s32[])) -> (s32[]) {
  %s = ((f32[32,4]{1,0}), f32[8,4]{1,0}) async-start(%q), calls=%wrapped
  %d = f32[8,4]{1,0} async-done(%s), calls=%wrapped
  ROOT %ar = (f32[16]{0}, bf16[8]{0}) all-reduce-start(%x, %y), replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %ag = ((bf16[6,48]{1,0}, f32[6]{0}), (bf16[48,48]{1,0}, f32[48]{0})) all-gather-start(%a, %b), \
replica_groups=[1,8]<=[8], dimensions={0}
  %ag.done = (bf16[48,48]{1,0}, f32[48]{0}) all-gather-done(%ag)
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %fmha = (bf16[8], u8[0]) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward"
}
"""


def test_the_text_of_a_gpu():
    assert read(GPU, {"data": 2, "fsdp": 4}) == (
        {
            "all-gather": along(1, 1, (48 * 48 * 2 + 48 * 4) * 7 // 8, "data+fsdp"),
            "all-reduce": along(1, 5, 5 * 2 * (64 + 16) * 7 // 8, "data+fsdp"),
            # 128 bytes are left of 4 times as many
            "reduce-scatter": along(1, 5, 5 * 128 * 3, "fsdp"),
        },
        {"__cudnn$fmhaSoftmaxBackward": 1},
        0,
    )


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "b"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "a"),
        ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", "b+c"),
        ("replica_groups=[2,4]<=[8]", "b+c"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "a"),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", "b"),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "b"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", "a+c"),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", "b"),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", "b+c"),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,2,2]T(1,0,2)) {'y'}", "c"),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", "c"),
        ("replica_groups={}", "a+b+c"),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", "c"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", "a+b"),
    ],
)
def test_groups_run_along_axes_of_the_mesh(groups, axes):
    """Each form in which compilers write groups of devices, on a mesh of 2 x 2 x 2."""
    kind = "collective-permute" if "pairs" in groups else "all-to-all"
    text = f"""HloModule jit_f, num_partitions=8

ENTRY %main (p: f32[64]) -> f32[64] {{
  ROOT %x = f32[64]{{0}} {kind}(%p), {groups}, channel_id=3
}}
"""
    (moved,) = read(text, {"a": 2, "b": 2, "c": 2}).collectives.values()
    assert set(moved.over) == {axes}


@pytest.mark.optimized
def test_a_program_sends_what_it_was_written_to_send(tmp_path):
    """Over 8 devices, five times each: what the program says is known from how it is written."""
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def each(x):  # float32 [16, 4] a device

        def body(x, _):
            whole = jax.lax.all_gather(x, "x", tiled=True)  # [128, 4]
            x = jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)  # [16, 4]
            x = jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])
            x = jax.lax.all_to_all(jnp.cos(x), "x", 0, 0, tiled=True)
            return x + jax.lax.psum(x.sum(0), "x"), None  # [4]

        return jax.lax.scan(body, x, None, length=5)[0]

    spread = jax.shard_map(each, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    with jax.numpy_rank_promotion("allow"):
        compiled = jax.jit(spread).lower(jax.ShapeDtypeStruct((128, 4), jnp.float32)).compile()
    share = 16 * 4 * 4  # bytes of x on a device
    found = read(compiled.as_text(), {"x": 8})
    assert found.kernels == {} and found.open_loops == 0
    assert {kind: moved.runs for kind, moved in found.collectives.items()} == dict.fromkeys(
        found.collectives, 5
    )
    sent = {kind: moved.bytes for kind, moved in found.collectives.items()}
    assert sent == {
        "all-gather": 5 * 7 * share,  # to each of 7 others its part, or the same around a ring
        "all-reduce": 5 * 2 * 7 * 16 // 8,  # of 16 bytes
        "all-to-all": 5 * share * 7 // 8,  # an eighth stays
        "collective-permute": 5 * share,
        "reduce-scatter": 5 * 7 * share,
    }


VALUES = """BufferAssignment:
allocation 0: size 4200, page 0, preallocated-temp:
 value: <0 wide.param.3{1} @0> (size=8,offset=4096): f32[2]{0}
 value: <1 fusion.1{0} @0> (size=8,offset=4096): f32[2]{0}
 value: <2 fusion.1{1} @0> (size=4096,offset=0): bf16[4,512]{1,0:T(8,128)(2,1)}
 value: <3 while.3{1} (phi) @0> (size=2048,offset=0): f32[512]{0}
allocation 1: size 512, page 0, parameter 3, shape |f32[128]| at ShapeIndex {}:
 value: <4 copy.2 (phi) @0> (size=512,offset=0): f32[128]{0}
allocation 2: size 8192, color 1, page 0, preallocated-temp:
 value: <5 vector @0> (size=8192,offset=0): f32[2048]{0}
"""
MODULE = """ENTRY %main {
  %fusion.1 = (f32[2], bf16[4,512]) fusion(%p), \
metadata={op_name="jit(run)/a/b/Block/ffn/dot" stack_frame_id=1}
  ROOT %copy.2 = f32[128] copy(%batch), metadata={op_name="batch[\\'text\\']"}
}
"""


def test_the_largest_buffers_are_named(tmp_path):
    """What lies in the place of a larger one is not told, nor what lies in another memory."""
    (tmp_path / "m.small-buffer-assignment.txt").write_text("BufferAssignment:")
    for end, text in (("-buffer-assignment", VALUES), ("", MODULE)):
        (tmp_path / f"m.after_optimizations{end}.txt").write_text(text)
    first, second, third = largest(tmp_path, 4)
    assert first == ("bf16[4,512]", 4096, "jit(run)/a/b/Block/ffn/dot")
    assert second == ("f32[128]", 512, "batch['text']")
    assert third == ("f32[2]", 8, "jit(run)/a/b/Block/ffn/dot")
    assert str(first) == "bf16[4,512] 0.00 GiB (b/Block/ffn/dot)"
    assert largest(tmp_path / "empty", 2) == []
