"""What wins back the accuracy that skipping costs: adapters that begin from a fit."""
