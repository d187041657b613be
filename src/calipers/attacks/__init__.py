"""THE UPPER JAW: propose points near the given ones that the model gets wrong. Knows nothing of
certificates, so that no shared bug can move both jaws.
"""
