"""The verification problem: model, points, threat model and goal."""
