"""Second derivatives of a loss: a maths library that knows tensors and losses, and no model."""
