"""THE ANSWER: evidence, the bracket it spans, the file it is kept in. Imports without torch."""
