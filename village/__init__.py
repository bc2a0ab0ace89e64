"""A small world whose truth is known, and the judge who knows it."""
