"""Studies: a question, declared before looking, taken from texts to a report.

    measure -> study_importance | study_linguistic | study_layers | study_codelength | study_robustness -> summarize

Each study takes a model and texts (or texts measured once, `measure`, or a finished run in a folder, `from_run`) and gives a
`Study`: declared hypothesis, verdict, red flags, what was not tested, tables and figures. `study.save(folder)` writes them with one
offline report; `basin-lens study NAME` does all of it.

| study | asks |
| --- | --- |
| `study_importance` | does compression go with token importance, beyond frequency, position, norm, density and surprisal? |
| `study_linguistic` | does it differ between parts of speech? who are the neighbors, by layer? |
| `study_layers` | how do scores move over depth, and where do they beat their controls? |
| `study_codelength` | does it go with how many bits the model needs for a token, or for the next one? |
| `study_robustness` | which findings survive other settings, and a model that has learned nothing? |
| `contrast` | do two kinds of tokens (spans of prompts) or of texts differ? |
| `study_mergeability` | does geometry predict which tokens the model can merge? (slow) |
| `study_basins` | does the model have basins at any layer, scale or path length? (slow) |
| `compare_models` | does it change between two models, or checkpoints, on the same texts? (`basin-lens compare`) |
| `study_memorization` | does compression see what a model was made to memorize, beyond its loss? (a `Plan`, not texts) |
| `study_merging` | what does causal token merging cost at equal bytes, trained and not? (`basin-lens merge test`) |
| `summarize` | all of them as one family, beside what the original guide would have said |
"""

from basin_lens.studies.basins.study import study_basins
from basin_lens.studies.codelength import study_codelength
from basin_lens.studies.contrast_study import contrast
from basin_lens.studies.framework.contrast import Contrast
from basin_lens.studies.framework.finished_runs import analyzers_for, from_run
from basin_lens.studies.framework.measured_texts import Measured
from basin_lens.studies.framework.measurement import measure
from basin_lens.studies.framework.registry import STUDIES
from basin_lens.studies.framework.study import Study
from basin_lens.studies.importance import study_importance
from basin_lens.studies.layers import study_layers
from basin_lens.studies.linguistic import study_linguistic
from basin_lens.studies.memorization.experiment import PRESETS, Plan
from basin_lens.studies.memorization.study import describe, plan_of, study_memorization
from basin_lens.studies.mergeability.study import study_mergeability
from basin_lens.studies.merging_comparison import study_merging
from basin_lens.studies.model_comparison import compare_models
from basin_lens.studies.robustness.study import study_robustness
from basin_lens.studies.summary import summarize

__all__ = [
    "PRESETS",
    "STUDIES",
    "Contrast",
    "Measured",
    "Plan",
    "Study",
    "analyzers_for",
    "compare_models",
    "contrast",
    "describe",
    "from_run",
    "measure",
    "plan_of",
    "study_basins",
    "study_codelength",
    "study_importance",
    "study_layers",
    "study_linguistic",
    "study_memorization",
    "study_mergeability",
    "study_merging",
    "study_robustness",
    "summarize",
]
