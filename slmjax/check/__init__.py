"""Checks that train something small and look whether a claim holds: one module each, `slmjax check NAME`."""
