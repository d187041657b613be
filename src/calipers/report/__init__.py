"""Reports on a record: numbers, terminal text and one HTML page.

This package can be imported without torch.
"""
