"""What responses to held-out problems say about a model: estimates, results on disk, tables."""
