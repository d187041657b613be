"""Models as they are measured: wrapped, checked and identified."""
