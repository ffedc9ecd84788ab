"""Text without duplicates and without what a model is tested on: ``python -m trainer.data.dedup``.

Where to look:

================== ===================================================================================
words.py           words, runs of words as 64-bit numbers, the Jaccard index of two documents
sketch.py          what is computed of each document: digest, MinHash, what it shares with test texts
decide.py          which documents stay
output.py          the folder that is written
run.py             the pieces of work, their processes, and what an interrupted run had done already
================== ===================================================================================
"""
