"""The reader of layouts, on a text of XLA's with one array of every kind of interest."""

from moejax.profiling import layouts

TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (param_0.1: u8[32,8,4096,7168]) -> bf16[8,4096,7168,2] {
  %param_0.1 = u8[32,8,4096,7168]{3,2,1,0:T(8,128)(4,1)} parameter(0)
  ROOT %broadcast.1 = bf16[8,4096,7168,2]{3,2,1,0:T(8,128)(2,1)} broadcast(%param_0.1), dimensions={}
}

ENTRY %main.1 (p0: u8[32,8,4096,7168], p1: f32[32,8,14336,16]) -> (f32[32,8,14336,16], bf16[16,4096]) {
  %p0 = u8[32,8,4096,7168]{3,2,1,0:T(8,128)(4,1)} parameter(0)
  %p1 = f32[32,8,14336,16]{2,3,1,0:T(8,128)} parameter(1), sharding={replicated}
  %pairs = bf16[4096,7168,2]{2,1,0:T(8,128)(2,1)} fusion(%p0), kind=kLoop, calls=%fused_computation
  %kernel = (f32[1024,3,64]{2,1,0:T(4,128)}, s32[17]{0:T(128)S(1)}) custom-call(%pairs), custom_call_target="tpu_custom_call"
  %part = f32[1024,3,64]{2,1,0:T(4,128)} get-tuple-element(%kernel), index=0
  ROOT %tuple.1 = (f32[32,8,14336,16]{2,3,1,0:T(8,128)}, bf16[16,4096]{1,0}) tuple(%p1, %part)
}
"""


def test_every_buffer_has_its_bytes_and_what_it_takes():
    """Adapters with the long axis last in memory take what they are; pairs 64 times as much; neither a fusion's inside nor names of what is
    there count."""
    found = {b.name: (b.bytes, b.padded_bytes) for b in layouts.buffers(TEXT) if b.bytes > 1000}
    codes, adapters, pairs = 32 * 8 * 4096 * 7168, 4 * 32 * 8 * 14336 * 16, 2 * 4096 * 7168 * 2
    assert found == {
        "p0": (codes, codes), "p1": (adapters, adapters), "pairs": (pairs, 64 * pairs), "kernel": (4 * 1024 * 192, 4 * 1024 * 4 * 128),
    }  # fmt: skip


def test_padded_are_the_large_ones():
    assert [(b.name, b.factor) for b in layouts.padded(TEXT)] == [("pairs", 64)]
    assert [b.name for b in layouts.padded(TEXT, at_least=10**6)] == ["pairs", "kernel"]
