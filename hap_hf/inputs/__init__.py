"""What layers read: which of them read units, and the second moments of their inputs, weighted by curvature."""
