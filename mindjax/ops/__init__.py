"""Numerical building blocks: one file per op, a reference in jnp and fast paths with the same signature."""
