"""PNI: a coreset whose members count only where position and neighbours make them likely."""
