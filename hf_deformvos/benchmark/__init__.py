"""How fast a model is here, in which stage its time goes, what it holds, and how it compares with other models."""
