"""Whether statistics keep their false positives and find what is there, on simulated data."""
