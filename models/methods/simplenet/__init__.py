"""SimpleNet, its released variant and its norm-constrained one, with the networks they share."""
