"""A model at rest: bare or not, masked, with other values for a while, put back as it was."""
