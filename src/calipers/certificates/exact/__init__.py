"""The exact distance: mixed-integer programs of a network, and the branches of which every bound is
proved again.
"""
