"""Who should answer: the edge model's own estimates, their calibration, and what must stay private."""
