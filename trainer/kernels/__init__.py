"""Where fused kernels go, one op per file, each beside its PyTorch reference; none is built yet (docs/decisions.md).

An op is a function of plain tensors: this rank's part, no DTensor and no module. It takes the place of one of these:

- attention: the call of ``scaled_dot_product_attention`` in :class:`trainer.model.opt.SelfAttention`;
- the feed-forward's bias and ReLU, and residual, dropout and layer norm: the lines of
  :meth:`trainer.model.opt.DecoderLayer.forward`. A fused dropout must give the bits of
  :func:`trainer.model.dropout.keep_mask`;
- the loss over a shard of the vocabulary: :meth:`trainer.engine.Engine.loss`;
- clipping and AdamW: :func:`trainer.optim.update`.
"""
