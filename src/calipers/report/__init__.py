"""What does the record say, to a reader? Numbers, terminal text and one self-contained page.
Imports without torch.
"""
