"""The method; torch and the standard library only.

Seven files are the method, in reading order: `guided` and `teacher` (the two training stages), `refusal` (the refusal
feature and score), `losses`, `targets` (soft labels), `scoring` and `verdict` (from scores to the decision on a row).
The others serve them: rows and batches, optimisation, decoding of encoded text, quality measures, a score cache.
"""
