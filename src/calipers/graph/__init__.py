"""THE LOWER JAW, 1: the network as a straight list of operations, and the facts each states about
itself.
"""
