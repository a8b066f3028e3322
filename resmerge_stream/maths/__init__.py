"""Tensors in, tensors out: no paths, no plans."""
