"""The demo world: seeded videos with captions, questions and answers that the shipped model learns from."""
