"""How models are judged: their translations, by either engine, and the scores of those."""
