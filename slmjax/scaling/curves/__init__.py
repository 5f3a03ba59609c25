"""Whole loss curves: the Multi-Power Law of a learning-rate schedule, its fit, and the decay it asks for."""
