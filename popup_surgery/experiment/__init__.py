"""From a recipe to a file, and from a file to its accuracy: where training and artifacts meet."""
