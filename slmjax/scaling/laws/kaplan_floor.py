"""Kaplan's surface above a floor."""

from slmjax.scaling.laws.kaplan import with_floor as law  # noqa: F401
