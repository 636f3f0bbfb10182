import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_cuda import jax_fused
from mindjax.data.packing import BatchShape
from mindjax.evaluation.compute import Compute
from mindjax.models import qwen3_vl
from mindjax.models.catalog import CATALOG
from mindjax.types import Batch, VisionInputs


@pytest.mark.parametrize("with_picture", [False, True])
def test_forward_flops_are_those_that_the_compiler_counts(with_picture, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(jax_fused, "usable", lambda: False)  # the compiler sees no operations inside a kernel
    # One layer each: the compiler counts a scanned body once.
    model = CATALOG["tiny"]
    model = replace(
        model,
        text=replace(model.text, num_hidden_layers=1),
        vision=replace(model.vision, depth=1, deepstack_visual_indexes=()),
    )
    rows, length, patches = 2, 64, 64
    vision = VisionInputs(
        np.zeros((1, patches, model.vision.patch_dim), np.float32),
        np.ones((1, patches, 4), np.int32),
        np.ones((1, patches), np.int32),
    )
    batch = Batch(
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length, 3), np.int32),
        np.ones((rows, length), np.int32),
        np.ones((rows, length), np.float32),
        np.full((rows, length), -1, np.int32),
        vision if with_picture else None,
    )

    def forward(params, batch):
        return qwen3_vl.logits(params, qwen3_vl.forward(params, model, batch).hidden)

    counted = jax.jit(forward).lower(qwen3_vl.abstract_params(model, jnp.float32), batch).cost_analysis()["flops"]
    compute = Compute(model)
    expected = compute.text(rows, length, length) + (compute.vision(1, patches) if with_picture else 0)
    # The compiler also counts norms, softmax and activations.
    assert 0.75 * counted < expected <= counted


def test_a_training_step_is_three_forward_passes():
    compute = Compute(CATALOG["tiny-moe"])
    shape = BatchShape(4, 128, 2, 64)
    assert compute.sft_step(shape, micro_batches=2) == 6 * (compute.text(4, 128, 128) + compute.vision(2, 64))
