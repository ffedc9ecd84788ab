"""What is true, what is wrong, what to do: pure functions over frozen data, standard library only."""
