"""Pleat: retrains image classifiers as a dependable routine."""
