"""Statistics: a table in, a table out.

Tokens of one text are not independent. With 40 sequences of 50 tokens, an intraclass correlation of 0.3 and no effect at all, a
test over tokens rejects 6 times out of 10. So every p-value and interval here is over whole sequences, documents, or another label
named as `unit`.

One text several times counts once, nearly equal ones too (`basin_lens.texts.copies` has the rule): of copies one stays in the test,
the note says how many were left out, and no two of them are on both sides of a split. Copies with different labels, where these are
what is compared, are all kept. To count copies as what they were given as, name a label that tells them apart as `unit`.

Each result row says the unit of analysis, how many units, sequences, documents and tokens, the test, the effect's name, estimate
and 95 % interval (`low`, `high`), what no effect would be (`null`), `p`, `p_corrected`, the `correction` and over how many tests.
What cannot be had is NaN.

| question | here |
| --- | --- |
| a score against another column | `within_sequence_correlation`, `rank_regression`, `quartile_table` |
| and beyond the usual confounds | `partial_correlation`, `mixed_model`, `residuals` (then any test) |
| two groups of texts, or of tokens in the same texts | `compare_groups` |
| a dose that each text has one of | `unit_slope` |
| a mean and its interval, group by group | `mean_interval` |
| texts alike in something, such as the loss | `match_units` |
| before and after, two runs on the same texts | `before_after`, on `basin_lens.compare` |
| detection, better than the loss, added to the loss | `detect`, `added_value` |
| parts of speech | `tag_effect`, `tag_means` |
| many layers and scores | `correction="max-t"`, `correct` (Holm, Benjamini-Hochberg), `best_layer` |
| reasons for doubt | `red_flags`, `reliability_bound` |
| what the original guide would have said, tokens counted as independent | `guide_tests` |
"""

from basin_lens.stats.added import added_value
from basin_lens.stats.association import partial_correlation, within_sequence_correlation
from basin_lens.stats.auroc import detect
from basin_lens.stats.choice import best_layer, halves
from basin_lens.stats.covariates import CONTROLS, add_controls, residuals
from basin_lens.stats.flags import red_flags
from basin_lens.stats.groups import before_after, compare_groups
from basin_lens.stats.matching import match_units
from basin_lens.stats.means import mean_interval
from basin_lens.stats.mixed import mixed_model
from basin_lens.stats.quartiles import quartile_table
from basin_lens.stats.rank_slopes import rank_regression
from basin_lens.stats.reliability import reliability_bound
from basin_lens.stats.results import correct
from basin_lens.stats.slopes import unit_slope
from basin_lens.stats.tags import tag_effect, tag_means
from basin_lens.stats.token_level import guide_tests

__all__ = [
    "CONTROLS",
    "add_controls",
    "added_value",
    "before_after",
    "best_layer",
    "compare_groups",
    "correct",
    "detect",
    "guide_tests",
    "halves",
    "match_units",
    "mean_interval",
    "mixed_model",
    "partial_correlation",
    "quartile_table",
    "rank_regression",
    "red_flags",
    "reliability_bound",
    "residuals",
    "tag_effect",
    "tag_means",
    "unit_slope",
    "within_sequence_correlation",
]
