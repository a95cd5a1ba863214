"""Our operators inside models that someone else wrote: `fuse_` swaps the forward of the blocks that they compute."""

from fastsr.fusion.fusing import fuse_, fused, unfuse_
from fastsr.fusion.report import Cost, Measurement, Report, Row

__all__ = ["Cost", "Measurement", "Report", "Row", "fuse_", "fused", "unfuse_"]
