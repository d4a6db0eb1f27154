"""What is said in names and numbers alone: groups, plans, what is left of them. Importing it imports no torch."""
