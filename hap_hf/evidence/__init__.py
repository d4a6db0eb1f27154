"""What is measured on: batches, losses, processes."""
