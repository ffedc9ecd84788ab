"""Fused operations ("ops"), one file each. docs/kernels.md says how an op is written, proven and switched on.

Each file has three functions with the same parameters, which are plain, contiguous tensors: the part of this rank, no
DTensor and no module.

- ``reference`` is the op in plain PyTorch, and what its kernel is compared with;
- ``fused`` always runs the kernel. On CPU tensors it needs Triton's interpreter, or a C++ compiler for CUDA C++;
- ``supported`` says in words why the kernel cannot run, or returns None.

:mod:`trainer.kernels.choice` decides which of them a model uses. Importing an op needs neither Triton nor a GPU.
"""
