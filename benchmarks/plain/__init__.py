"""The computations of the original programs, written the slow way that they take: what the benchmarks measure against.

Nothing outside ``benchmarks`` and its tests uses these. They give the numbers of the package, which
tests/integration/test_benchmarks.py checks.
"""
