"""Readers of ONNX files: a network as a graph, operation by operation."""
