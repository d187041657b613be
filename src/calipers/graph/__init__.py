"""The network as a list of operations, and the facts of each operation."""
