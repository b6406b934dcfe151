"""How long a video takes here, chunk by chunk and stage by stage, and how long it would take at the limits of the device.

report     the figures and what they must name; two reports side by side
video      times of whole stages: text, transformer, autoencoder, copy, first chunk, whole video
stages     inside the transformer: device time by the scope that a kernel was written in
floors     what every stage cannot do without, in FLOPs and bytes, from the config
ceilings   the FLOPs and bytes a second that this device reaches
"""

from lf_jax.bench.report import Pair, Report, Row, compare, facts, load, row, timed
from lf_jax.bench.video import measure, record

__all__ = ["Pair", "Report", "Row", "compare", "facts", "load", "measure", "record", "row", "timed"]
