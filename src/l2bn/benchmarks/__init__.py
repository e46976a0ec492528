"""Measurements of speed and memory, in processes set up as those of a run."""

import l2bn.training  # noqa: F401 # before torch is loaded: it sets how threads wait
