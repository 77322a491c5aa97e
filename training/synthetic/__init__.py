"""The synthetic world: seeded videos with captions, questions and answers; the shipped model learns from it."""
