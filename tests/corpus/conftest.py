"""Hypothesis without its deadline: a busy machine is no failure."""

from hypothesis import settings

settings.register_profile("infscan", deadline=None)
settings.load_profile("infscan")
