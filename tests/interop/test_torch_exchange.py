"""Arrays shared between JAX and torch: the same memory in both directions, and an error wherever it could not be."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mindjax.data.packing import collate_prompts
from mindjax.interop.torch_exchange import to_jax, to_torch
from mindjax.models import qwen3_vl
from tests.train import tiny

DTYPES = {
    jnp.float32: torch.float32,
    jnp.bfloat16: torch.bfloat16,
    jnp.float16: torch.float16,
    jnp.int32: torch.int32,
    jnp.int8: torch.int8,
    jnp.bool_: torch.bool,
    jnp.float8_e4m3fn: torch.float8_e4m3fn,
    jnp.float8_e5m2: torch.float8_e5m2,
}


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (2, 3, 4)], ids=str)
def test_both_directions_share_memory(dtype: Any, shape: tuple[int, ...]) -> None:
    array = jnp.asarray(values(shape)).astype(dtype)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.dtype == DTYPES[dtype] and tuple(tensor.shape) == shape
    np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(array.astype(jnp.float32)))

    again = to_jax(tensor)
    assert again.unsafe_buffer_pointer() == tensor.data_ptr()
    assert again.dtype == array.dtype and again.shape == shape
    np.testing.assert_array_equal(np.asarray(again), np.asarray(array))

    made_by_torch = torch.tensor(values(shape)).to(DTYPES[dtype])
    array = to_jax(made_by_torch)
    assert array.unsafe_buffer_pointer() == made_by_torch.data_ptr()
    assert array.dtype == dtype
    np.testing.assert_array_equal(np.asarray(array.astype(jnp.float32)), made_by_torch.float().numpy())


def test_a_write_on_one_side_is_seen_on_the_other() -> None:
    tensor = torch.zeros(4, 8)
    array = to_jax(tensor)
    tensor[1, 2] = 7
    assert np.asarray(array)[1, 2] == 7


def test_memory_outlives_the_side_that_made_it() -> None:
    tensor = to_torch(jnp.arange(1 << 16, dtype=jnp.float32) + 1)
    array = to_jax(torch.arange(1 << 16, dtype=torch.float32) + 1)
    churn = [jnp.full(1 << 16, 9.0) for _ in range(8)] + [torch.full((1 << 16,), 9.0) for _ in range(8)]
    expected = np.arange(1 << 16, dtype=np.float32) + 1
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(np.asarray(array), expected)
    del churn


def test_donation_leaves_a_shared_buffer_alone() -> None:
    array = jnp.ones((64, 64))
    tensor = to_torch(array)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert result[0, 0] == 2 and (tensor == 1).all()


def test_parameters_of_a_model() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.init(tiny.moe_model()))
    tensors = to_torch(params)
    shared = jax.tree.map(lambda tensor, leaf: tensor.data_ptr() == leaf.unsafe_buffer_pointer(), tensors, params)
    assert all(jax.tree.leaves(shared))
    back = to_jax(tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    batch = collate_prompts(tiny.samples(2), merge_size=2)
    run = jax.jit(lambda params: qwen3_vl.token_logprobs(params, tiny.moe_model(), batch).logp)
    np.testing.assert_array_equal(np.asarray(run(back)), np.asarray(run(params)))


TENSORS_THAT_CANNOT = {
    "transposed": (lambda: torch.randn(8, 6).T, "contiguous"),
    "strided": (lambda: torch.randn(8, 6)[:, ::2], "contiguous"),
    "expanded": (lambda: torch.randn(1, 4).expand(3, 4), "contiguous"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "contiguous"),
    "unaligned": (lambda: torch.randn(65)[1:], "clone"),
    "gradient": (lambda: torch.randn(4, requires_grad=True), "detach"),
    "negative": (lambda: torch.randn(4, 4)._neg_view(), "resolve_neg"),
    "conjugate": (lambda: torch.randn(4, dtype=torch.complex64).conj(), "resolve_conj"),
    "int64": (lambda: torch.arange(4), "32 bits"),
    "float64": (lambda: torch.zeros(4, dtype=torch.float64), "32 bits"),
    "meta": (lambda: torch.empty(4, device="meta"), "meta"),
    "numpy": (lambda: np.zeros(4), "no torch tensor"),
}


@pytest.mark.parametrize("name", TENSORS_THAT_CANNOT)
def test_tensor_that_cannot_be_shared_is_refused_by_name(name: str) -> None:
    make, says = TENSORS_THAT_CANNOT[name]
    with pytest.raises(ValueError, match=says) as error:
        to_jax({"layers": [make()]})
    assert "['layers'][0]" in str(error.value)


@pytest.mark.parametrize(
    ("array", "says"),
    [(np.zeros(4, np.float32), "no JAX array"), (jnp.zeros(4, jnp.int4), "int4"), (jax.random.key(0), "key")],
    ids=["numpy", "int4", "key"],
)
def test_array_that_cannot_be_shared_is_refused_by_name(array: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        to_torch({"embed": array})
    assert "['embed']" in str(error.value)


def test_tracer_is_refused() -> None:
    with pytest.raises(ValueError, match="jit"):
        jax.jit(to_torch)(jnp.zeros(4))


def test_array_over_two_devices_is_refused() -> None:
    program = (
        "import jax, jax.numpy as jnp\n"
        "from jax.sharding import NamedSharding, PartitionSpec\n"
        "from mindjax.interop.torch_exchange import to_torch\n"
        "array = jax.device_put(jnp.ones((4, 4)), NamedSharding(jax.make_mesh((2,), ('d',)), PartitionSpec('d')))\n"
        "try: to_torch(array)\n"
        "except ValueError as error: print(error)\n"
        "part = array.addressable_shards[1].data\n"
        "print(to_torch(part).data_ptr() == part.unsafe_buffer_pointer())"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **flags}
    )
    assert result.returncode == 0, result.stderr
    message, shared = result.stdout.strip().splitlines()
    assert "2 devices" in message and shared == "True"


@pytest.mark.gpu
def test_both_directions_share_memory_of_a_gpu() -> None:
    """Work still queued on either side is waited for: the values are those after it."""
    device = jax.devices("cuda")[0]
    array = jax.device_put(jnp.asarray(values((256, 256))), device).astype(jnp.bfloat16)
    product = array @ array
    tensor = to_torch(product)
    assert tensor.is_cuda and tensor.data_ptr() == product.unsafe_buffer_pointer()
    back = to_jax(tensor @ tensor)
    expected = np.asarray(product).astype(np.float32) @ np.asarray(product).astype(np.float32)
    np.testing.assert_allclose(np.asarray(back).astype(np.float32), expected, rtol=2e-2, atol=2e-2 * expected.std())
