"""Qwen3-VL, one part per file, and its weights in and out."""
