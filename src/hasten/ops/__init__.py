"""Tensor functions, nothing of models: the attention contract, its oracle and its implementations."""
