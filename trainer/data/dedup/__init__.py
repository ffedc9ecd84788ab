"""Text without duplicates and without what a model is tested on: ``python -m trainer.data.dedup``.

Where to look:

================== ===================================================================================
words.py           words, runs of words as 64-bit numbers, the Jaccard index of two documents
pieces.py          the files, the pieces of work that they are cut into, the numbers of documents
sketch.py          what is computed of each document: digest, MinHash, what it shares with test texts
work.py            what is asked for, and what an engine is given
processes.py       work for several processes, of which any may be killed
datatrove_steps.py datatrove's signatures and buckets, over our runs of words
slurm.py           its tasks as jobs of Slurm: handed in, waited for, done again
candidates.py      documents that may be copies of one another, from either engine
decide.py          which documents stay
output.py          the folder that is written
run.py             all of it in order, and what an interrupted run had done already
================== ===================================================================================
"""
