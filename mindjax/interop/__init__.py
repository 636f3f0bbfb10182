"""The only package that imports torch, vLLM or Hugging Face model classes."""
