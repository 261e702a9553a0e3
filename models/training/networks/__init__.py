"""Networks, and blocks of such, that several methods train from random weights."""
