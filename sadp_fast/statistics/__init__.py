"""What a pass of a network measures: energies by layer and example, and the scores made of them."""
