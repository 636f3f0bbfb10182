"""Meshes and sharding rules; knows no model."""
