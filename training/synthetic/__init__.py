"""The synthetic world: seeded videos with captions, questions and answers for the shipped model."""
