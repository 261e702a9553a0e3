"""DRAEM: rebuilds what was pasted over, and tells where from image and rebuilt image."""
