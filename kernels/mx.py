"""MXFP8 (``inductor_ext/moe/mx.py``) as rules name it, and the granularity of the ops that end in it."""

from inductor_ext.kernels import quantized
from inductor_ext.moe.mx import *  # noqa: F403

GRANULARITY = quantized.MX
