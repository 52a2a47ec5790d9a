"""What a run shows of itself: progress, metrics, pictures, the report."""
