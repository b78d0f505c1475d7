"""Does geometry predict which tokens the model can merge? Forced merges, their costs, and the report."""
