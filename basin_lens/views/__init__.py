"""Looking at tables: token views, layer curves, reports. Each returns a value; showing and saving are separate."""

from basin_lens.views.layers import layer_curve
from basin_lens.views.report import Report, make_report
from basin_lens.views.tokens import TokenView, token_view

__all__ = ["Report", "TokenView", "layer_curve", "make_report", "token_view"]
