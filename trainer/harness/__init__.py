"""Evaluate a converted checkpoint: the child process of ``opt-ops ckpt evaluate``.

It runs in the environment of ``[evaluate] python``, with lm-evaluation-harness and transformers, and never downloads.
"""
