"""THE QUESTION: which model, which points, and what may the adversary do?"""
