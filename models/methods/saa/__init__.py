"""SAA and SAA+, zero-shot; only what runs their two networks imports the package transformers."""
