"""Exact distances by mixed-integer programming, each bound proved again.

The branches of the search are those of a mixed-integer program of the network; no bound is taken
from a solver without a proof in rounded arithmetic.
"""
