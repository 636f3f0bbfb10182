"""Losses as pure functions of log-probabilities, never of a model."""
