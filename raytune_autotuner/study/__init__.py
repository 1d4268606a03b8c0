"""What is asked: the study file, the search space, and the nouns that all rooms speak of. Pure data."""
