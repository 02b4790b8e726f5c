"""Methods whose trained parameters are tokens: they enter a model by hooks."""
