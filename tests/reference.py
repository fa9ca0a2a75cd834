"""Naive fp64 oracles, written for clarity only; tests and benchmarks compare the product against them."""
