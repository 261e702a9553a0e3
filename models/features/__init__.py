"""Mathematics on stored feature maps, shared by the methods; no method lives here."""
