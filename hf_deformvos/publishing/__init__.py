"""Publishing on the Hub: what a release consists of, and how it gets there."""
