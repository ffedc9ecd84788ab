"""The place for fused kernels, one op per file, each with its PyTorch reference. None exists yet (docs/decisions.md).

An op is a function of plain tensors: the part of this rank, no DTensor and no module. Candidates are:

- attention: the call of ``scaled_dot_product_attention`` in :class:`trainer.model.opt.SelfAttention`;
- bias and ReLU of the feed-forward layer, and residual, dropout and layer norm, in
  :meth:`trainer.model.opt.DecoderLayer.forward`. A fused dropout must produce the bits of
  :func:`trainer.model.dropout.keep_mask`;
- the loss over a shard of the vocabulary, in :meth:`trainer.parallel.engine.Engine.loss`;
- clipping and AdamW, in :func:`trainer.optim.update`.
"""
