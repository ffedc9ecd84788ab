"""Other trainers under the supervisor: one module for each framework. ``docs/adapters.md`` is their page.

``pytorch``, ``transformers``, ``lightning`` and ``torchtitan`` are what a training script imports. They share ``rank``
(what a supervised rank does around an update), ``settings``, ``optimizer`` and ``checkpoints``.
"""
