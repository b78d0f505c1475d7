"""Which findings survive other settings: the settings, what counts as surviving, and the study."""
