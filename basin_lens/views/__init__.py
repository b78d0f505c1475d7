"""Looking at tables and results: token views, curves, maps, intervals, joint distributions, reports and study pages.

Each returns a value; showing and saving are separate.
"""

from basin_lens.views.canvas import save
from basin_lens.views.categories import distributions
from basin_lens.views.codec_figures import size_bars
from basin_lens.views.detection import dose_curve, roc
from basin_lens.views.explorer import Explorer, StaticExplorer, explore
from basin_lens.views.grids import curve_panels, grid_map
from basin_lens.views.intervals import forest, quartile_bars, tag_intervals
from basin_lens.views.joint import joint_density, scatter
from basin_lens.views.layers import layer_curve, position_map, result_curve
from basin_lens.views.merges import merge_view, pareto, training_curves
from basin_lens.views.pages.codec import code_page
from basin_lens.views.pages.page import Report
from basin_lens.views.pages.report import make_report
from basin_lens.views.pages.study import Section, flags_said, study_card, study_page
from basin_lens.views.tokens import TokenView, layer_view, token_view

__all__ = [
    "Explorer",
    "Report",
    "Section",
    "StaticExplorer",
    "TokenView",
    "code_page",
    "curve_panels",
    "distributions",
    "dose_curve",
    "explore",
    "flags_said",
    "forest",
    "grid_map",
    "joint_density",
    "layer_curve",
    "layer_view",
    "make_report",
    "merge_view",
    "pareto",
    "position_map",
    "quartile_bars",
    "result_curve",
    "roc",
    "save",
    "scatter",
    "size_bars",
    "study_card",
    "study_page",
    "tag_intervals",
    "token_view",
    "training_curves",
]
