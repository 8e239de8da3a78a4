"""Training plans: their arguments, calibration, JSON, and the statement of what they promise."""
