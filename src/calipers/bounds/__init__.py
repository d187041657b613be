"""THE LOWER JAW, 2: boxes and lines pushed through the graph."""
