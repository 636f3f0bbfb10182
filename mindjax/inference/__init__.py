"""Sampling from a model: the KV cache, the batched sampler, and the `generate` command."""
