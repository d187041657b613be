"""The functions of the package, one module for each task."""
