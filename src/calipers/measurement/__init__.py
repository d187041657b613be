"""Measurements: plans of tools, the referee and the loop that runs them."""
