"""Does compression see what a model was made to memorize? The experiment, its tests, and the report."""
