"""Jobs of a sweep: where they run, what became of them, what the terminal shows."""
