"""Logical axes to mesh axes."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from mindjax.models import catalog, qwen3_vl
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.parallel import Parallel
from sharding.rules import partition_spec, sharding_for


def test_the_table() -> None:
    assert partition_spec(("layer", "embed", "mlp")) == PartitionSpec("stage", "fsdp", "tensor")
    assert partition_spec(("layer", "expert", "expert_mlp", "embed")) == PartitionSpec(
        "stage", "expert", "tensor", "fsdp"
    )
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp", "expert"), None)


def test_two_dimensions_on_one_mesh_axis() -> None:
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' of .* both map to 'tensor'"):
        partition_spec(("heads", "embed", "mlp"))
    with pytest.raises(ValueError, match=r"'batch' and 'embed' of .* both map to 'fsdp'"):
        partition_spec(("batch", "embed"))


def test_an_unknown_axis_suggests() -> None:
    with pytest.raises(ValueError, match=r"no rule for logical axis 'head'; did you mean 'heads'\?"):
        partition_spec(("head",))


def test_a_dimension_that_does_not_divide() -> None:
    mesh = AbstractMesh((1, 2, 1, 1, 1, 4), ("data", "fsdp", "stage", "sequence", "expert", "tensor"))
    assert sharding_for(("vocab", "embed"), mesh, (1000, 6)).spec == PartitionSpec("tensor", "fsdp")
    with pytest.raises(ValueError, match=r"'vocab' has size 1001, which mesh axis 'tensor' of size 4"):
        sharding_for(("vocab", "embed"), mesh, (1001, 6))


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_every_parameter_of_every_model_has_a_layout(name: str) -> None:
    config = catalog.CATALOG[name]
    shardings = qwen3_vl.shardings(config, Parallel(Layout(), make_mesh()))
    shapes = qwen3_vl.abstract_params(config)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)

    def check(path: object, sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> None:
        assert len(sharding.spec) == leaf.ndim
        # What is large must not be whole on every device.
        if leaf.size > 10_000_000:
            assert any(sharding.spec), path

    jax.tree_util.tree_map_with_path(check, shardings, shapes)
