"""What all studies share: measuring once, declared tests, wording, storage."""
