"""How the model is spread over ranks: the mesh, and two engines."""
