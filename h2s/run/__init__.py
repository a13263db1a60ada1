"""What a recipe needs around all that."""
