"""Bounds of the values of a network over a region.

Interval arithmetic and linear relaxations, propagated through the graph: what certificates, the
lower bounds on the distance, are made of.
"""
