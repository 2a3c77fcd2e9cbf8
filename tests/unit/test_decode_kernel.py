"""What attention of a step hands to FlashAttention, whose place a loop over slots takes here."""

import pytest
import torch

from mcore_core.model import decode
from mcore_core.model.packed import PackedRow


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, mask, **more):
    """Attention over packed rows as the kernel defines it: the last query sees the last key."""
    assert (dropout, causal, mask, max_q) == (0.0, False, False, 1)
    assert q.is_contiguous()
    assert max_k >= int(more["seqused_k"].max())
    left = more["window_size_left"]
    assert more["window_size_right"] == (-1 if left < 0 else 0)
    assert cu_q.dtype == cu_k.dtype == more["seqused_k"].dtype == torch.int32
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i, used in enumerate(more["seqused_k"].tolist()):
        first = 0 if left < 0 else max(0, used - 1 - left)
        begin = int(cu_k[i])
        keys, values = (x[begin + first : begin + used] for x in (k, v))
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = keys[:, group] @ q[int(cu_q[i]), head] * more["scale"]
            lse[head, i] = scores.logsumexp(0)
            out[i, head] = scores.softmax(0) @ values[:, group]
    return out, lse, None, None, None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)])
def test_slots_are_rows_of_the_kernel(monkeypatch, heads, groups, window, sinks):
    monkeypatch.setattr(decode, "_FLASH", flash)
    monkeypatch.setattr(decode, "has_kernel", lambda dtype, device, sizes: True)
    generator = torch.Generator().manual_seed(0)
    slots, capacity, size = 4, 12, 8
    positions = torch.tensor([0, 11, 7, 3])
    query = torch.randn(slots, heads, size, generator=generator)
    kept = tuple(
        torch.randn(slots + 2, groups, capacity, size, generator=generator) for _ in range(2)
    )
    row = PackedRow(qkv_format="thd", positions_T=positions)
    state = decode.DecodeState(slots, capacity)
    row.kept = decode.Kept(state, torch.arange(slots), positions, keys=capacity)
    offset = torch.randn(heads, generator=generator) if sinks else None
    given = {"scale": size**-0.5, "sinks": offset}
    found = decode.attend_step(query, kept, row, window=window, **given)
    plain = decode.attend_step(query, kept, row, window=window, fused=False, **given)
    assert torch.allclose(found, plain, atol=1e-5)
    assert not torch.allclose(found[1], found[2], atol=1e-2)


def test_which_devices_have_it():
    half, cuda, cpu = torch.bfloat16, torch.device("cuda"), torch.device("cpu")
    assert decode.has_kernel(half, cuda, (128, 128))
    for dtype, device, sizes in (
        (torch.float32, cuda, (128, 128)),
        (half, cpu, (128, 128)),
        (half, cuda, (192, 128)),
        (half, cuda, (12, 12)),
        (half, cuda, (512, 512)),
    ):
        assert not decode.has_kernel(dtype, device, sizes)
