"""A small Kimi Linear that answers from a long context: model, task, training."""
