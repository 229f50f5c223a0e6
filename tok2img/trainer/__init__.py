"""How a model is trained: a fault-tolerant trainer, optimizers, checkpoints."""
