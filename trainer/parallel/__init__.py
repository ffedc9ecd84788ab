"""How the model is spread over ranks: the mesh and the two engines."""
