"""THE LOWER JAW, 3: claims about a problem that are proved."""
