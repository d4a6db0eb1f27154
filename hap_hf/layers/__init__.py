"""What a layer is: how it keeps its inputs and outputs, and how it is cut."""
