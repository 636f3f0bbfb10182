"""A plain grouped product in Triton, to compare with: what an afternoon gives, tuned over a few tile shapes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CONFIGS = [
    triton.Config({"BM": m, "BN": n, "BK": 64}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 256, 8, 4), (64, 128, 4, 4))
]


@triton.autotune(configs=CONFIGS, key=["k", "n", "groups", "rows_bucket"])
@triton.jit
def _gmm(  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    x, w, out, ends, k, n, groups, rows_bucket, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    # Each program walks the groups to its tile; programs past the last tile have nothing to do.
    tile, column = tl.program_id(0) // tl.cdiv(n, BN), tl.program_id(0) % tl.cdiv(n, BN)
    group, start, end = 0, 0, tl.load(ends)
    tiles = tl.cdiv(end, BM)
    while (tile >= tiles) & (group < groups - 1):
        tile -= tiles
        group += 1
        start = end
        end = tl.load(ends + group)
        tiles = tl.cdiv(end - start, BM)
    if tile < tiles:
        rows = start + tile * BM + tl.arange(0, BM)
        columns = column * BN + tl.arange(0, BN)
        depth = tl.arange(0, BK)
        a = x + rows.to(tl.int64)[:, None] * k + depth[None, :]
        b = w + tl.cast(group, tl.int64) * k * n + depth[:, None] * n + columns[None, :]
        inside = (rows < end)[:, None]
        total = tl.zeros((BM, BN), tl.float32)
        for at in range(0, k, BK):
            left = depth < k - at
            block = tl.load(a, mask=inside & left[None, :], other=0.0)
            total += tl.dot(block, tl.load(b, mask=left[:, None] & (columns < n)[None, :], other=0.0))
            a += BK
            b += BK * n
        tl.store(
            out + rows.to(tl.int64)[:, None] * n + columns[None, :],
            total.to(tl.bfloat16),
            mask=inside & (columns < n)[None, :],
        )


def gmm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [R, K] by w [G, K, N] in bfloat16; `ends` [G] int32 holds the row after each group's last. No zeroed tail."""
    (rows, k), (groups, _, n) = x.shape, w.shape
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return ((triton.cdiv(rows, meta["BM"]) + groups) * triton.cdiv(n, meta["BN"]),)

    _gmm[grid](x, w, out, ends, k, n, groups, (rows - 1).bit_length())
    return out
