"""Benchmarks against other servers: ``python -m tests.benchmarks``."""
