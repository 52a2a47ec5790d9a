"""Workers, what they send each other, and the files that they write."""
